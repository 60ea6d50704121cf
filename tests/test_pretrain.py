"""Making the embedded model again: stages resume, gates are told, and the files are what diffusers reads."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tc_lightning.backbone import TINY, Backbone
from tc_lightning.pretrain import GATES, missed, pretrain
from tc_lightning.pretrain.aesthetic import colourfulness, make_head
from tc_lightning.pretrain.stage import Workshop, fit
from tc_lightning.tiny.model import TOKENS, make_clip, make_noise_scheduler, make_tokenizer, make_unet, make_vae


class Stop(Exception):
    """In the place of a power cut."""


def quiet(folder, **options):
    return Workshop(folder, say=lambda line: None, **options)


def small_fit(folder, steps=6, stop_at=None, ema_decay=None, saves=()):
    """A stage that learns a line; raises Stop before step `stop_at`, and writes its state after the steps in `saves`."""
    from tc_lightning.pretrain import stage

    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss(step):
        if step == stop_at:
            raise Stop
        stage.SAVE_EVERY = -1.0 if step in saves else 1e9
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return fit(quiet(folder), "line", model, loss, steps, 0.1, ema_decay).state_dict()


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stage_that_was_killed_equals_one_that_was_not(stop_at, ema_decay, tmp_path, monkeypatch):
    monkeypatch.setattr("tc_lightning.pretrain.stage.SAVE_EVERY", 60.0)
    whole = small_fit(tmp_path / "whole", ema_decay=ema_decay)
    with pytest.raises(Stop):
        small_fit(tmp_path / "parts", stop_at=stop_at, saves=(stop_at - 1,), ema_decay=ema_decay)
    parts = small_fit(tmp_path / "parts", ema_decay=ema_decay)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    again = small_fit(tmp_path / "parts", ema_decay=ema_decay, stop_at=0)  # done: no step is run
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_workshop_remembers_what_is_done(tmp_path):
    shop = quiet(tmp_path, effort=0.25)
    assert (shop.steps(100), shop.steps(1), shop.done("vae")) == (25, 1, False)
    shop.finish("vae", psnr_db=30.123456)
    assert quiet(tmp_path).done("vae") and quiet(tmp_path).quality == {"vae": {"psnr_db": 30.1235}}
    assert json.loads((tmp_path / "quality.json").read_text()) == {"vae": {"psnr_db": 30.1235}}


def test_missed_gates_are_told():
    quality = {
        "vae": {"renders_strict": 1.0},
        "clip": {"right_caption": 0.9},
        "unet": {"strict": 0.7, "failures_of_alignment": 0.9},
    }
    assert missed(quality) == [
        "gate missed: clip right_caption is 0.9, wanted 0.95 to 1.0",
        "gate missed: unet strict is 0.7, wanted 0.4 to 0.6",
    ]
    pairs = {"preference": {"pair_accuracy_preference": 0.6, "pair_accuracy_clip": 0.7}}
    assert missed(pairs) == ["gate missed: the preference model orders pairs no better than the plain CLIP"]


def test_the_shipped_model_passes_its_gates(root):
    """Every stage's figures lie beside the weights; each was measured on the files as they are shipped."""
    quality = json.loads((root / "tc_lightning" / "tiny" / "weights" / "quality.json").read_text())
    assert {stage for stage, *_ in GATES} <= set(quality) and missed(quality) == []


@pytest.mark.full
@torch.no_grad()
def test_the_shipped_files_reach_the_figures_that_lie_beside_them(root):
    """Measured again on fewer drawings, so within three standard errors and not to the digit."""
    from transformers import CLIPModel

    from tc_lightning.backbone import Backbone
    from tc_lightning.pretrain.clip import measure_clip
    from tc_lightning.pretrain.unet import measure_unet
    from tc_lightning.pretrain.vae import measure_vae

    weights = root / "tc_lightning" / "tiny" / "weights"
    quality = json.loads((weights / "quality.json").read_text())
    backbone = Backbone.load("tiny")
    clip = CLIPModel.from_pretrained(weights / "clip", dtype=torch.float32).eval()
    found = {"decoder": measure_vae(backbone.vae, 256), "clip": measure_clip(clip, backbone.tokenizer, 500)}
    found["unet"] = measure_unet(backbone, 128)
    for stage, figure, count in (
        ("decoder", "renders_strict", 256),
        ("decoder", "reconstructions_strict", 256),
        ("clip", "right_caption", 500),
        ("unet", "strict", 128),
    ):
        share = quality[stage if figure != "renders_strict" else "vae"][figure]
        error = 3 * (max(share * (1 - share), 0.01) / count) ** 0.5
        assert abs(found[stage][figure] - share) < error, (stage, figure, found[stage][figure], share)
    assert abs(found["decoder"]["psnr_db"] - quality["decoder"]["psnr_db"]) < 0.5


def test_no_path_of_a_machine_is_shipped(root):
    weights = root / "tc_lightning" / "tiny" / "weights"
    for file in [*weights.rglob("*.json"), *weights.rglob("*.txt")]:
        assert '"/' not in file.read_text(encoding="utf-8").replace('"/"', "").replace('"/</w>"', ""), file


def test_the_shipped_model_is_small(root):
    weights = root / "tc_lightning" / "tiny" / "weights"
    assert sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) < 15e6, "bytes"


def test_tokenizer_holds_captions_and_any_other_text(tmp_path):
    from transformers import CLIPTokenizer

    from tc_lightning.tiny.shapes import captions

    tokenizer = make_tokenizer(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = captions(500, 0)
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    assert sum(length > TOKENS for length in lengths) <= 5
    assert all(again(text).input_ids == tokenizer(text).input_ids for text in texts)
    for text in (*texts, "\u00dcn\u00efcode \U0001f600 zebra"):
        ids = tokenizer(text).input_ids
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        assert plain.replace(" ", "").lower() == text.replace(" ", "").lower()
        assert tokenizer.unk_token_id not in ids[1:-1]


def test_the_parts_fit_together(tmp_path):
    vae, unet, clip = make_vae(), make_unet(), make_clip(make_tokenizer(tmp_path))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = vae.encode(images).latent_dist.mean
    assert latents.shape == (2, 8, 8, 8) and vae.decode(latents).sample.shape == images.shape
    embeds = clip.text_model(torch.zeros(2, TOKENS, dtype=torch.long)).last_hidden_state
    assert unet(latents, torch.tensor([1, 999]), embeds).sample.shape == latents.shape
    assert make_noise_scheduler().config.num_train_timesteps == 1000


def test_colourfulness_is_hasler_and_suesstrunks():
    """The published formula with its population statistics in numpy, rescaled as the docstring says."""
    import numpy as np

    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for image, rating in zip(images.numpy(), colourfulness(images), strict=True):
        rg, yb = image[0] - image[1], (image[0] + image[1]) / 2 - image[2]
        spread, strength = np.hypot(rg.std(ddof=1), yb.std(ddof=1)), np.hypot(rg.mean(), yb.mean())
        assert rating.item() == pytest.approx(1 + 15 * (spread + 0.3 * strength), rel=1e-4)
    grey = torch.rand(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert colourfulness(grey).item() == pytest.approx(1.0, abs=1e-4)
    assert [name for name in make_head().state_dict() if name.endswith("weight")] == [f"{n}.weight" for n in (0, 2, 4, 6, 7)]


@pytest.fixture
def tiny_effort(monkeypatch):
    """A few steps of small batches, and measurements on a handful of images."""
    from tc_lightning.pretrain import clip, preference, tuned, unet, vae

    monkeypatch.setattr(tuned, "STYLES", {"aesthetic": (4.0, 30.0, 1)})
    for module in (vae, unet):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(preference, "BATCH", 2)
    monkeypatch.setattr(clip, "SCENES", 4)
    for module, name in ((vae, "measure_vae"), (unet, "measure_unet"), (clip, "measure_clip")):
        measure = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, measure=measure, **options: measure(*args, count=8))
    captions = preference.captions
    monkeypatch.setattr(preference, "captions", lambda count, *args: captions(min(count, 16), *args))
    scenes = unet.scenes
    monkeypatch.setattr(unet, "scenes", lambda split, count, seed: scenes(split, min(count, 64), seed))
    # untrained images show nothing, so no pair would be decided
    monkeypatch.setattr(preference.Pairs, "decided", lambda self: list(range(len(self.prompts))))


STAGES = ("vae", "decoder", "clip", "unet", "preference", "aesthetic", "tuned")


@pytest.mark.full
def test_all_stages_complete_and_equal_a_run_that_was_killed_between_and_within_them(tiny_effort, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    import tc_lightning as tc
    from tc_lightning.pretrain import stage, unet

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    quality = pretrain(quiet(whole, effort=0.001))
    assert set(quality) == set(STAGES)

    finish, loss = Workshop.finish, unet.alt_text

    def cut_after_clip(self, name, **figures):
        finish(self, name, **figures)
        if name == "clip":
            raise Stop

    monkeypatch.setattr(Workshop, "finish", cut_after_clip)
    with pytest.raises(Stop):
        pretrain(quiet(parts, effort=0.001))
    monkeypatch.setattr(Workshop, "finish", finish)

    monkeypatch.setattr(stage, "SAVE_EVERY", -1.0)
    told = []

    def cut_in_the_unet(scene, rng: random.Random):
        told.append(scene)
        if len(told) > 2 * unet.BATCH:
            raise Stop
        return loss(scene, rng)

    monkeypatch.setattr(unet, "alt_text", cut_in_the_unet)
    with pytest.raises(Stop):
        pretrain(quiet(parts, effort=0.001))
    monkeypatch.setattr(unet, "alt_text", loss)
    assert torch.load(parts / "unet.pt", weights_only=True)["step"] == 2
    assert pretrain(quiet(parts, effort=0.001)) == quality
    torch.set_num_threads(threads)

    files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.suffix in (".safetensors", ".pth"))
    assert len(files) == 7
    for file in files:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file

    pipe = StableDiffusionPipeline.from_pretrained(whole)
    assert pipe.unet.dtype == torch.float32 or pipe.unet.dtype == torch.float16
    assert tc.generate(tc.Backbone.load(whole), ["a red circle"], [0], steps=2).shape == (1, 3, 32, 32)


@pytest.mark.full
def test_the_stage_of_tuned_text_encoders(tmp_path, monkeypatch):
    """On a copy of the shipped model: adapters in fp16, a run that names its base by the folder it lies in, and figures."""
    from tc_lightning.pretrain import tuned

    shop = quiet(shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("tuned")), effort=0.02)
    monkeypatch.setattr(tuned, "STYLES", {"clip": (30.0, 0.0, 100)})
    tuned.train_tuned(shop)
    run = tmp_path / "model" / "tuned" / "clip"
    assert {value.dtype for value in load_file(run / "lora" / "text_encoder" / "adapter_model.safetensors").values()} == {
        torch.float16
    }
    loaded = Backbone.load(run)
    assert loaded.base_record["source"] == str((tmp_path / "model").resolve())
    assert not torch.equal(loaded.encode(["a red circle"]), Backbone.load("tiny").encode(["a red circle"]))
    assert str(tmp_path) not in "".join(file.read_text() for file in run.rglob("*.json"))
    assert set(shop.quality["tuned"]) == {f"{model}_{score}" for model in ("base", "clip") for score in ("tiny_clip", "strict")}
    monkeypatch.setattr(tuned, "tune", None)
    tuned.train_tuned(shop)  # what is done is not trained again
