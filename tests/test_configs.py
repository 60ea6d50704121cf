"""Every option of every group composes and builds; every experiment runs a step. New yaml files are found by themselves."""

import json
import tarfile
from pathlib import Path

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
from small_runs import door, small_language_model, small_pipeline

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ("hydra", "__pycache__"))
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
LISTS = ("reward", "logger", "watch", "regularizer")
PROMPTS = "\n".join(f"a red circle number {index}" for index in range(20))


def verbs_of(group: str) -> list[str]:
    """The verbs whose defaults name a group."""
    from omegaconf import OmegaConf

    found = []
    for file in sorted(CONF.glob("*.yaml")):
        defaults = OmegaConf.to_container(OmegaConf.load(file), resolve=False).get("defaults", [])
        if any(isinstance(entry, dict) and group in entry for entry in defaults):
            found.append(file.stem)
    return found


@pytest.fixture
def composed():
    from hydra import compose, initialize_config_dir

    def composed(verb, *overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):  # closed again: the door opens it for itself
            return compose(verb, overrides=list(overrides))

    return composed


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Small files in the place of what would be downloaded: arguments by reward, and a model folder."""
    folder = tmp_path_factory.mktemp("small")
    clip, tokenizer = str(small_clip_folder(folder / "clip")), str(small_tokenizer(folder / "tokenizer"))
    small_pipeline(folder / "model")
    (folder / "prompts.csv").write_text("prompt\n" + PROMPTS)
    hps = {"checkpoint": str(small_open_clip(folder / "HPS.pt")), "config": OPEN_CLIP, "tokenizer": tokenizer}
    network = {
        "checkpoint": str(small_image_reward(folder / "r.pt")),
        "config": MED,
        "tokenizer": str(bert_tokenizer(folder / "b")),
    }
    rewards = {
        "CLIPScore": {"checkpoint": clip},
        "CLIPTunedScore": {"checkpoint": clip},
        "PickScore": {"checkpoint": clip, "processor": clip},
        "Aesthetic": {"checkpoint": str(small_head(folder / "head.pth")), "clip": clip},
        "HPSv2": hps,
        "ImageReward": network,
    }
    return rewards, folder


def arguments(node, small, tmp_path) -> dict:
    """What a node of conf/ needs beside its own settings to be built on this machine."""
    rewards, folder = small
    kind = node["_target_"].rsplit(".", 1)[-1]
    if kind in rewards:
        return rewards[kind]
    if node["_target_"].endswith("Backbone.load"):
        return (
            {"random_weights": True}
            if "random_weights" in node
            else {"source": node["source"] if node["source"] == "tiny" else str(folder / "model")}
        )
    if kind == "Trainer":
        return {
            "accelerator": "cpu",
            "precision": "32-true",
            "devices": 1,
            "strategy": "auto",
            "logger": False,
            "enable_checkpointing": False,
        }
    if kind.lower().endswith("logger"):
        return {"save_dir": str(tmp_path)}
    if kind == "RewardCeiling":
        return {"at": {"tiny_preference": 23.0}}
    if kind == "LanguageModel":
        return {"checkpoint": str(small_language_model(folder / "gpt2"))}
    if "PromptData" in node["_target_"]:
        numbers = {"dev": 2, "heldout": 2, "seed": 0}
        if kind in ("image_folder", "webdataset", "hub_images"):
            return numbers | captioned_images(folder / "images", kind)
        return numbers | ({"path": str(folder / "prompts.csv")} if "path" in node else {"train": 8})
    return {}


def captioned_images(folder: Path, kind: str) -> dict:
    """Ten pictures with captions as a folder, a tar, or a parquet file that `datasets` reads."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for index in range(10):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a caption {index}")
    if kind == "image_folder":
        return {"path": str(folder)}
    if kind == "webdataset":
        with tarfile.open(folder / "all.tar", "w") as archive:
            for file in sorted(folder.glob("[0-9]*")):
                archive.add(file, file.name)
        return {"path": str(folder / "all.tar")}
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    rows = {"image": [str(file) for file in sorted(folder.glob("*.png"))], "text": [f"a caption {i}" for i in range(10)]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "set.parquet")
    return {"name": str(folder)}


def targets(node, path="") -> list[tuple[str, dict]]:
    """Every mapping with a _target_, unresolved."""
    if isinstance(node, dict):
        inner = [found for key, value in node.items() for found in targets(value, f"{path}.{key}".strip("."))]
        return [(path, node)] if "_target_" in node else inner
    return []


def test_every_group_belongs_to_a_verb():
    assert {group for group in GROUPS if not verbs_of(group)} == set()


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_every_option_composes_and_builds(group, option, composed, small, tmp_path):
    from hydra.utils import instantiate
    from omegaconf import DictConfig, OmegaConf

    from tc_lightning.cli.errors import _explain  # noqa: F401  the door imports as the tests do

    verb = "train" if "train" in verbs_of(group) else verbs_of(group)[0]
    choice = f"{group}=[{option}]" if group in LISTS else f"{group}={option}"
    if group == "sweep":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra sweep is not installed")
    cfg = composed(verb, choice)
    key = "backbone" if group == "experiment" else group
    if (group, option) == ("logger", "wandb"):
        pytest.importorskip("wandb", reason="the extra wandb is not installed")
    if group == "bench":
        return  # built from small files in test_benches.py
    raw = OmegaConf.to_container(cfg, resolve=False).get(key) or {}
    for path, node in targets(raw, key):
        given = OmegaConf.select(cfg, path)
        assert isinstance(given, DictConfig)
        extra = arguments(node, small, tmp_path)
        if node.get("_target_", "").endswith("Backbone.load") and extra.get("random_weights"):
            with torch.device("meta"):
                built = instantiate(given, **extra)
        elif key == "method":
            built = instantiate(given, _partial_=True)
        elif key == "optimizer":
            built = instantiate(given)([torch.nn.Parameter(torch.zeros(1))])
        elif "config" in extra:  # merged, since instantiate has an argument of that name
            built = instantiate({**OmegaConf.to_container(given, resolve=True), **extra})
        else:
            built = instantiate(given, **extra)
        assert built is not None


def test_an_option_says_what_it_is():
    """A comment at the head of every file that sets something."""
    for group, option in OPTIONS:
        lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
        if group in ("experiment", "table"):
            head = "\n".join(line for line in lines if line.startswith("#"))
            for word in ("command:", "expected:", "time:"):
                assert word in head, (option, word)


def test_the_embedded_models_chain_is_the_same_everywhere(composed):
    """conf/backbone/tiny.yaml is what the model was measured with and what generate takes for it."""
    from tc_lightning.tiny.model import SAMPLING

    chain = composed("train").chain
    assert {name: chain[name] for name in SAMPLING} == SAMPLING


def test_the_papers_numbers(composed):
    cfg = composed("train", "backbone=sd15", "prompts.path=prompts.csv")
    assert (cfg.chain.steps, cfg.chain.guidance_scale, cfg.schedule.k, cfg.optimizer.lr) == (25, 7.5, 5, 1e-6)
    assert (cfg.max_steps, cfg.tuned_fraction, cfg.chain.timestep_spacing) == (10000, 0.6, "trailing")
    assert (cfg.optimizer.weight_decay, list(cfg.optimizer.betas)) == (0.01, [0.9, 0.999])


def rendered(values: dict) -> str:
    """A mapping in Hydra's grammar."""
    return json.dumps(values).replace('"', "")


@pytest.mark.full
@pytest.mark.parametrize("name", [option for group, option in OPTIONS if group == "experiment"])
def test_every_experiment_runs_a_step(name, composed, small, tmp_path):
    """As it is, but for a small model, small rewards and one step; its rewards, weights and schedule are its own."""
    from omegaconf import OmegaConf

    rewards, folder = small
    cfg = OmegaConf.to_container(composed("train", f"experiment={name}"), resolve=False)
    overrides = [
        "max_steps=1",
        "prompts.batch_size=2",
        "prompts.heldout=2",
        "val.prompts=2",
        "val.every=1",
        "trainer=cpu",
        "seed=0",
    ]
    overrides += [f"chain.steps={1 + cfg['schedule'].get('k', 1)}"]
    overrides += [f"callbacks.{key}.prompts=2" for key, value in cfg["callbacks"].items() if "prompts" in value]
    if cfg["backbone"]["source"] == "tiny":
        overrides += ["prompts.train=8"]
    else:
        if cfg["stage"] == "unet":
            overrides += [f"backbone.text_encoder={folder / 'model'}"]
        overrides += [f"backbone.source={folder / 'model'}", "backbone.image_size=null", f"prompts.path={folder / 'prompts.csv'}"]
    for path, node in targets({key: cfg.get(key) or {} for key in ("reward", "constraint", "watch")}):
        for key, value in rewards.get(node["_target_"].rsplit(".", 1)[-1], {}).items():
            plus = "" if key in node else "+"
            overrides.append(f"{plus}{path}.{key}={rendered(value) if isinstance(value, dict) else value}")
    done = door("train", f"experiment={name}", *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert done.status == 0, done.err
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    assert card["status"] == "finished" and card["steps"] == 1
    assert set(card["metrics"]["after"]) >= set(cfg["reward"]) | {"total"}


@pytest.mark.full
def test_a_sweep_of_two_runs(tmp_path):
    """Hydra's own -m: a folder a job, each whole."""
    from small_runs import SMALL

    done = door("train", "-m", *SMALL, "max_steps=1", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.status == 0, done.err
    cards = [json.loads((tmp_path / "sweep" / job / "run.json").read_text()) for job in ("0", "1")]
    assert [card["status"] for card in cards] == ["finished"] * 2
    assert [card["config"]["seed"] for card in cards] == [0, 1]
