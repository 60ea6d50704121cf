"""Every reward against the code its authors publish, on small random checkpoints in the published layouts: tests/parity/run.sh."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reward_checkpoints import (  # noqa: E402
    MED,
    as_images,
    bert_tokenizer,
    fill,
    full_tokenizer,
    pictures,
    shared_data,
    small_image_reward,
    small_open_clip,
)

pytestmark = pytest.mark.extended
SIZE = 224
VISION = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
PLAIN = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}
WIDE = {"embed_dim": 48, "vision_cfg": {**VISION, "width": 88, "head_width": 22, "mlp_ratio": 4.3637}, "text_cfg": TEXT}
QUICK = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
BLIP = {**MED, "hidden_size": 768, "num_attention_heads": 12, "image_size": SIZE, "patch_size": 32}
COSINES = {"clip": 1.0, "hpsv2": 1.0, "pickscore": 100.0}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of checkpoints, pictures and prompts, scored by the publications' code."""
    python = os.environ.get("TC_PARITY_PYTHON")
    if not python:
        pytest.skip("the scorers' environment is built by tests/parity/run.sh (TC_PARITY_PYTHON)")
    folder = tmp_path_factory.mktemp("parity")
    tokenizer = full_tokenizer(folder / "tokenizer")
    parti = [row["Prompt"] for row in csv.DictReader(shared_data("PartiPrompts.tsv").open(), delimiter="\t")]
    awkward = ["a red dog " * 40, "  Tom &amp; Jerry,  “quoted”  ", *[prompt for prompt in parti if "’" in prompt][:2]]
    prompts = awkward + parti[::95]
    job = {
        "bpe": str(shared_data("bpe_simple_vocab_16e6.txt.gz")),
        "open_clip": PLAIN,
        "wide": WIDE,
        "quick": QUICK,
        "med": BLIP,
        "hpsv2": str(small_open_clip(folder / "HPS.pt", 1, PLAIN)),
        "clip": str(small_open_clip(folder / "clip.pt", 2, WIDE)),
        "openai": str(small_open_clip(folder / "openai.pt", 3, QUICK)),
        "head": str(shared_data("sac+logos+ava1-l14-linearMSE.pth")),
        "pickscore": str(pickscore_folder(folder / "pickscore", tokenizer)),
        "imagereward": str(small_image_reward(folder / "ImageReward.pt", 4, BLIP, (1024, 128, 64, 16, 1))),
        "med_config": str(med_config(folder / "med_config.json")),
        "bert": str(bert_tokenizer(folder / "bert")),
        "prompts": prompts[:20],
        "all_prompts": parti + ["a red dog " * 40, "naïve café, ﬁne", "日本語 の 猫 😀", "x" * 300, "don't we'll I'd"],
        "pictures": {"same": [], "any": []},
    }
    for which, made in (("same", [picture.resize((SIZE, SIZE)) for picture in pictures()]), ("any", pictures())):
        for index, picture in enumerate(made):
            picture.save(folder / f"{which}{index}.png")
            job["pictures"][which].append(f"{which}{index}.png")
    (folder / "job.json").write_text(json.dumps(job))
    subprocess.run([python, Path(__file__).with_name("scorers.py"), folder], check=True)
    return job | {"folder": folder, "tokenizer": tokenizer, "theirs": json.loads((folder / "scores.json").read_text())}


def med_config(path: Path) -> Path:
    """med_config.json as published, with small numbers."""
    fixed = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0, "type_vocab_size": 2, "model_type": "bert"}
    dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}
    path.write_text(json.dumps({**fixed, **dropout, **BLIP, "encoder_width": 0, "add_cross_attention": True}))
    return path


def pickscore_folder(folder: Path, tokenizer: Path) -> Path:
    """PickScore's repository and its processor's in one: a CLIPModel of transformers, the processor's settings as published."""
    from transformers import CLIPConfig, CLIPModel

    shutil.copytree(tokenizer, folder)
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "projection_dim": 48},
            vision_config={**tower, "image_size": SIZE, "patch_size": 32, "projection_dim": 48},
            projection_dim=48,
        )
    )
    clip.load_state_dict(fill({name: tuple(value.shape) for name, value in clip.state_dict().items()}, 5))
    clip.save_pretrained(folder)
    statistics = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    steps = {"do_resize": True, "size": SIZE, "resample": 3, "do_center_crop": True, "crop_size": SIZE, "do_normalize": True}
    kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kind, **steps, **statistics}))
    return folder


def ours(name: str, job: dict):
    """The project's reward on the same files."""
    from tc_lightning.rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore

    return {
        "hpsv2": lambda: HPSv2(job["hpsv2"], config=PLAIN, tokenizer=job["tokenizer"]),
        "clip": lambda: CLIPScore(job["clip"], config=WIDE, tokenizer=job["tokenizer"]),
        "aesthetic": lambda: Aesthetic(job["head"], clip=job["openai"], config=QUICK, tokenizer=job["tokenizer"]),
        "pickscore": lambda: PickScore(job["pickscore"]),
        "imagereward": lambda: ImageReward(job["imagereward"], config=job["med_config"], tokenizer=job["bert"]),
    }[name]()


def score(reward, job: dict, which: str) -> torch.Tensor:
    from PIL import Image

    with torch.no_grad():
        files = [Image.open(job["folder"] / name).convert("RGB") for name in job["pictures"][which]]
        return torch.cat([reward(as_images(file), [prompt]) for file, prompt in zip(files, job["prompts"], strict=True)])


@pytest.mark.parametrize("name", ["hpsv2", "clip", "aesthetic", "pickscore", "imagereward"])
def test_the_published_number(name, job):
    """Same pixels: 1e-4 relative. From the picture: 2e-3 in cosine each, 5e-4 in the mean; heads: 1/50 and 1/200 of the spread."""
    reward = ours(name, job)
    same, any_size = score(reward, job, "same"), score(reward, job, "any")
    their_same, their_any = (torch.tensor(job["theirs"][f"{name}/{which}"]) for which in ("same", "any"))
    unit, spread = COSINES.get(name, 1.0), float(their_any.std())
    difference = (any_size - their_any) / unit
    relative = float(((same - their_same).abs() / their_same.abs().clamp(min=0.01 * unit)).max())
    each, mean = (2e-3, 5e-4) if name in COSINES else (spread / 50, spread / 200)
    largest, average = float(difference.abs().max()), abs(float(difference.mean()))
    picture = f"from the picture {largest:.1e} each, {average:.1e} mean, spread {spread / unit:.3f}"
    print(f"\n{name}: same pixels {relative:.1e} relative, spread {float(their_same.std()) / unit:.3f}; {picture}")
    assert float(their_same.std()) > 100 * 1e-4 * float(their_same.abs().mean())
    assert relative <= 1e-4
    assert spread / unit >= 20 * each
    assert largest <= each
    assert average <= mean
    if name != "aesthetic":
        from PIL import Image

        images = as_images(Image.open(job["folder"] / job["pictures"]["any"][0]).convert("RGB"))
        assert abs(float(reward(images, [job["prompts"][5]]) - any_size[0])) / unit > each


def test_tokens_are_those_of_open_clip_and_hpsv2(job):
    """Every Parti prompt, and awkward ones; padding differs and does not matter (attention is causal)."""
    tower = ours("hpsv2", job).tower
    own = [row[: row.index(49407) + 1] for row in tower.tokenize(job["all_prompts"]).tolist()]
    for package, rows in job["theirs"]["tokens"].items():
        wrong = [
            prompt for prompt, mine, row in zip(job["all_prompts"], own, rows, strict=True) if mine != row[: row.index(49407) + 1]
        ]
        assert not wrong, f"{package}: {len(wrong)} of {len(rows)}, {wrong[:3]}"
