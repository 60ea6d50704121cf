"""The moving average: by hand, in checkpoints and resumes, where it is used; early stopping; the UNet stage's refusals."""

import json

import pytest
import torch
from small_runs import SMALL, door, refused, train
from torch import nn

from tc_lightning.ema import EMA

SHORT = ("val.every=100", "prompts.heldout=2", "checkpoint_every=1", "callbacks=ema", "callbacks.ema.decay=0.5")


class Two(nn.Module):
    """One part learns, one does not."""

    def __init__(self):
        super().__init__()
        self.learns, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


class At:
    """A trainer at some step."""

    def __init__(self, step=0):
        self.global_step = step


def test_the_average_by_hand():
    module, ema, trainer = Two(), EMA(0.6), At()
    ema.on_train_start(trainer, module)
    assert set(ema.average) == {"learns.weight", "learns.bias"}
    expected = module.learns.weight.detach().clone()
    for step in (1, 2, 3, 30):
        with torch.no_grad():
            module.learns.weight.add_(step)
        trainer.global_step = step
        ema.on_train_batch_end(trainer, module)
        ema.on_train_batch_end(trainer, module)  # a further batch of the same step moves nothing
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.learns.weight.detach()
        torch.testing.assert_close(ema.average["learns.weight"], expected)


def test_the_average_stands_in_and_goes_again():
    module, ema, trainer = Two(), EMA(0.5), At()
    ema.on_train_start(trainer, module)
    start = module.learns.weight.detach().clone()
    with torch.no_grad():
        module.learns.weight.add_(1)
    ema.on_validation_start(trainer, module)
    ema.on_validation_start(trainer, module)
    assert torch.equal(module.learns.weight, start)
    checkpoint = {"state_dict": {"learns.weight": start.clone()}}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    assert torch.equal(checkpoint["state_dict"]["learns.weight"], start + 1)
    ema.on_validation_end(trainer, module)
    assert torch.equal(module.learns.weight, start + 1)


def test_refusals():
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="accepted: 0 to below 1"):
            EMA(decay)
    ema = EMA()
    ema.load_state_dict({"average": {"other": torch.zeros(1)}})
    with pytest.raises(ValueError, match="of other parameters, the first is learns.bias"):
        ema.on_train_start(At(), Two())


@pytest.mark.full
def test_a_resumed_average_is_that_of_an_uninterrupted_run(tmp_path):
    from safetensors.torch import load_file

    whole = train(tmp_path / "whole", *SHORT, "max_steps=3")
    train(tmp_path / "parts", *SHORT, "max_steps=1")
    parts = train(tmp_path / "parts", *SHORT, "max_steps=3", "ckpt_path=last")
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    averages = [found["callbacks"]["EMA"]["average"] for found in (one, two)]
    assert averages[0].keys() == one["state_dict"].keys()
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]) and torch.equal(one["state_dict"][name], two["state_dict"][name])
    assert not all(torch.equal(value, one["state_dict"][name]) for name, value in averages[0].items())
    assert whole["metrics"] == parts["metrics"]
    exported = load_file(tmp_path / "whole" / "text_encoder" / "model.safetensors")
    short = {name.split("text_encoder.", 1)[1].removeprefix("text_model."): value for name, value in averages[0].items()}
    for name, value in exported.items():
        if name.removeprefix("text_model.") in short:
            assert torch.equal(value, short[name.removeprefix("text_model.")])  # the average is what the run ends with


@pytest.mark.full
def test_early_stopping_is_lightnings(tmp_path):
    """A score that cannot get better: the rate is 0."""
    options = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "val.every=1", "optimizer.lr=0", "max_steps=6")
    card = train(tmp_path / "run", *options, "prompts.heldout=2")
    assert card["status"] == "finished" and card["steps"] == 2


def test_the_unet_stage_needs_a_tuned_text_encoder(tmp_path):
    run = f"hydra.run.dir={tmp_path / 'run'}"
    done = door("train", "experiment=paper_unet", "prompts.path=none.txt", run)
    refused(done, "the UNet stage trains on the frozen text encoder of a finished text run: backbone.text_encoder=<run folder>")
    refused(door("train", *SMALL, "stage=text", run), "stage=text: accepted are null and unet")
    (tmp_path / "untuned").mkdir()
    (tmp_path / "untuned" / "run.json").write_text(json.dumps({"backbone": {"source": "tiny"}}))
    options = (*SMALL, "tune.text_encoder=frozen", "tune.unet=full", f"backbone.text_encoder={tmp_path / 'untuned'}")
    refused(door("train", *options, run), "the run did not finish or did not tune it")
    refused(door("train", *SMALL, "tune.text_encoder=frozen", "tune.unet=frozen", run), "both frozen")


@pytest.mark.full
def test_the_picture_before_and_after_a_unet_stage_differs(tmp_path):
    """Of a UNet that has learned there is no original left to draw: the images at the start are kept."""
    from PIL import Image

    train(tmp_path / "text", *SHORT[:3], "max_steps=1")
    options = ("tune.text_encoder=frozen", "tune.unet=full", "optimizer.lr=1e-2", f"backbone.text_encoder={tmp_path / 'text'}")
    card = train(tmp_path / "unet", *SHORT[:3], *options, "max_steps=2")
    assert card["backbone"]["text_encoder"] == str(tmp_path / "text") and (tmp_path / "unet" / "unet").is_dir()
    picture = Image.open(tmp_path / "unet" / "samples" / "before_after.png")
    (kept,) = (tmp_path / "unet" / "samples" / "original").glob("*.png")
    assert Image.open(kept).size == (32, 32) and picture.size[0] > 64
    before, after = card["metrics"]["before"]["total"], card["metrics"]["after"]["total"]
    assert abs(before - after) > 1e-3
