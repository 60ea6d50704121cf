"""conf/: every published reward and constraint composes and builds, with a small checkpoint in the place of the large one."""

import re

import pytest
import torch
from reward_checkpoints import (
    MED,
    OPEN_CLIP,
    bert_tokenizer,
    small_clip_folder,
    small_head,
    small_image_reward,
    small_open_clip,
    small_tokenizer,
)

PAPER = {
    "paper_text": (50.0, 3.0, 1.0, 100.0),
    "paper_text_appendix": (100.0, 1.0, 1.0, 100.0),
    "paper_text_table6": (100.0, 3.0, 1.0, 100.0),
}


@pytest.fixture(scope="module")
def compose_train(request):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(request.config.rootpath / "conf"), version_base=None):
        yield lambda *overrides: compose("train", overrides=list(overrides))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    clip, tokenizer = str(small_clip_folder(folder / "clip")), str(small_tokenizer(folder / "tokenizer"))
    hps = {"checkpoint": str(small_open_clip(folder / "HPS.pt")), "config": OPEN_CLIP, "tokenizer": tokenizer}
    reward = {
        "checkpoint": str(small_image_reward(folder / "r.pt")),
        "config": MED,
        "tokenizer": str(bert_tokenizer(folder / "bert")),
    }
    return {
        "clip": {"checkpoint": clip},
        "pickscore": {"checkpoint": clip},
        "aesthetic": {"checkpoint": str(small_head(folder / "head.pth")), "clip": clip},
        "hpsv2": hps,
        "imagereward": reward,
        "clip_tuned": {"checkpoint": clip},
    }


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_published_reward_builds_and_scores(dtype, compose_train, small):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf, flag_override

    from tc_lightning.rewards import RewardMix

    names = ["aesthetic", "pickscore", "hpsv2", "clip", "imagereward"]
    cfg = compose_train(f"reward=[{','.join(names)}]", f"reward_dtype={dtype or 'null'}")
    with flag_override(cfg, "struct", False):
        cfg.reward = OmegaConf.merge(cfg.reward, {name: small[name] for name in names})
    mix = RewardMix({name: instantiate(cfg.reward[name]) for name in names})
    total, scores = mix(torch.rand(2, 3, 70, 50), ["red dog", "cat"])
    assert list(scores) == names and bool(total.isfinite().all())
    assert [reward.weight for reward in mix.rewards.values()] == [3.0, 1.0, 100.0, 100.0, 1.0]
    towers = [reward.tower.clip for reward in mix.rewards.values() if hasattr(reward, "tower")]
    assert {tower.dtype for tower in towers} == {torch.bfloat16 if dtype else torch.float32}


@pytest.mark.parametrize("name", ["clip", "clip_tuned"])
def test_constraints_build(name, compose_train, small):
    from hydra.utils import instantiate

    cfg = compose_train(f"constraint={name}")
    constraint = instantiate(cfg.constraint.constraint, **small[name])
    assert constraint.weight == {"clip": 50.0, "clip_tuned": 100.0}[name]


def test_no_constraint(compose_train):
    assert compose_train("constraint=none").constraint.constraint is None


@pytest.mark.parametrize("name", list(PAPER))
def test_paper_presets_have_the_published_weights(name, compose_train):
    cfg = compose_train(f"experiment={name}", "prompts.path=prompts.csv")
    clip, *rewards = PAPER[name]
    assert cfg.constraint.constraint.weight == clip
    assert [cfg.reward[key].weight for key in ("aesthetic", "pickscore", "hpsv2")] == rewards
    assert set(cfg.reward) == {"aesthetic", "pickscore", "hpsv2"}
    assert (cfg.chain.steps, cfg.schedule.k, cfg.optimizer.lr, cfg.chain.guidance_scale) == (25, 5, 1e-6, 7.5)
    assert not cfg.reward.pickscore.all_pairs


def test_a_reward_of_ones_own_by_its_target(compose_train, tmp_path, monkeypatch, root):
    """The example of docs/rewards.md, in a module outside the package, with the options that it tells the user to type."""
    from hydra.utils import instantiate

    from tc_lightning.rewards import RewardMix

    text = (root / "docs" / "rewards.md").read_text()
    (code,) = re.findall(r"```python\n# my_rewards.py\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    options = re.findall(r"'(\+reward\.[^']*)'", text)
    assert len(options) == 2
    cfg = compose_train("reward=[]", *options)
    mix = RewardMix({name: instantiate(value) for name, value in cfg.reward.items()})
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    total, scores = mix(images, ["a", "b"])
    total.sum().backward()
    assert set(scores) == {"warmth", "jpeg"} and images.grad.abs().sum() > 0
    assert all(value.shape == (2,) for value in scores.values())
    with pytest.raises(ValueError, match="jpeg has no gradient"):
        mix.require_differentiable()
