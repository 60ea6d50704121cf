"""The hacking watch: what it measures, when it speaks, what it keeps."""

import csv
import warnings

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger

from tc_lightning.backbone import Backbone
from tc_lightning.module import TextCraftor
from tc_lightning.prompts import PromptData
from tc_lightning.rewards.base import FunctionReward
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.tiny import tiny_clip
from tc_lightning.schedules import LastK
from tc_lightning.watch import HackingWatch


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def darkness(images, prompts):
    return -images.mean((1, 2, 3))


def train(folder, callback, held=darkness, steps=4, lr=3e-3, checkpoint=None, clip=False):
    backbone = Backbone.load("tiny")
    reward = RewardMix(light=FunctionReward(brightness, differentiable=True, weight=1.0))
    watch = {"held": FunctionReward(held, name="held")} | ({"clip": tiny_clip()} if clip else {})
    options = {"schedule": LastK(1), "steps": 2, "guidance_scale": 1.0, "tuned_fraction": 1.0}
    module = TextCraftor(backbone, reward, watch=RewardMix(watch), optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **options)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(module, PromptData.shapes(train=64, dev=4, heldout=0, batch_size=4), ckpt_path=checkpoint)
    return trainer, module


def watcher(**changes):
    return HackingWatch(**{"held": "held", "margin": 0.0, "trained": "light", "every": 2, "prompts": 3, "seeds": 2} | changes)


def logged(folder):
    with (folder / "metrics.csv").open() as file:
        return {name: [float(row[name]) for row in rows if row[name]] for rows in [list(csv.DictReader(file))] for name in rows[0]}


@pytest.mark.full
def test_it_warns_once_when_the_held_out_score_falls_while_the_trained_one_rises(tmp_path):
    watch = watcher()
    with pytest.warns(UserWarning, match="held-out held is .* while light rose .*hacked; no weights were better") as caught:
        train(tmp_path, watch)
    assert len([entry for entry in caught if "hacked" in str(entry.message)]) == 1
    assert watch.alarms == [2, 4]
    assert not (tmp_path / "checkpoints" / "best_held.ckpt").exists()
    found = logged(tmp_path)
    assert set(found) >= {"watch/held", "watch/trained", "watch/drop", "watch/saturation", "watch/text_drift", "train/light"}
    assert found["watch/text_drift"][0] == 0
    assert found["watch/text_drift"][1] > 0
    assert found["watch/drop"][0] == 0
    assert found["watch/drop"][-1] > 0
    assert found["watch/trained"][-1] > found["watch/trained"][0]


def test_it_stops(tmp_path):
    with pytest.warns(UserWarning, match="the run stops"):
        trainer, _ = train(tmp_path, watcher(action="stop"), steps=6)
    assert trainer.global_step == 2


def test_a_fall_within_the_margin_is_no_alarm(tmp_path):
    watch = watcher(margin=10.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hacked.*")
        train(tmp_path, watch)
    assert watch.alarms == []


@pytest.mark.full
def test_it_keeps_the_best_weights_and_goes_on_after_a_resume(tmp_path):
    watch = watcher()
    _, module = train(tmp_path, watch, held=brightness, clip=True)
    kept = torch.load(tmp_path / "checkpoints" / "best_held.ckpt", weights_only=True)
    assert watch.best["step"] == kept["global_step"] == 4
    for name, value in kept["state_dict"].items():
        torch.testing.assert_close(value, module.state_dict()[name], atol=0, rtol=0)
    assert 0 < logged(tmp_path)["watch/diversity"][0] < 2

    again = watcher()
    train(tmp_path / "again", again, held=brightness, steps=4, checkpoint=tmp_path / "checkpoints" / "best_held.ckpt")
    assert again.best == {"held": pytest.approx(watch.best["held"]), **{key: watch.best[key] for key in ("trained", "step")}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held": "oracle"}, "held may be held, trained light, total"),
        ({"held": "light"}, "held may be held"),
        ({"trained": "held"}, "trained"),
    ],
)
def test_scores_that_are_not_there_or_on_the_wrong_side(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, watcher(**changes))


@pytest.mark.parametrize("changes", [{"action": "shout"}, {"margin": -1}, {"every": 0}, {"seeds": 1}, {"prompts": 0}])
def test_bad_settings(changes):
    with pytest.raises(ValueError, match="accepted"):
        watcher(**changes)
