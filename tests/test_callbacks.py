"""Sample grids, scores before and after, throughput and the clean stop, on a small model in a real Trainer."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from small_runs import small_pipeline

import tc_lightning as tc
from tc_lightning.callbacks import BeforeAfter, CleanStop, SampleGrid, Throughput, checkpoints
from tc_lightning.prompts import PromptData, fixed_seed
from tc_lightning.rewards.base import Reward

PROMPTS = [f"a red circle number {index}" for index in range(12)]


class Brightness(Reward):
    """Mean of the pixels."""

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def fit(folder, tmp_path):
    """fit(*callbacks, steps, ...) -> (trainer, module) after training in tmp_path."""

    def run(*callbacks, steps=2, data=None, ckpt_path=None, **options):
        module = tc.TextCraftor(
            tc.Backbone.load(folder),
            tc.RewardMix(brightness=Brightness(10.0)),
            schedule=tc.LastK(1),
            steps=2,
            guidance_scale=2.0,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
        )
        data = data or PromptData(PROMPTS[:8], dev=PROMPTS[8:9], heldout=PROMPTS[9:], batch_size=2)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=list(callbacks),
            default_root_dir=str(tmp_path),
            logger=False,
            enable_checkpointing=False if not options.pop("saving", False) else None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            **options,
        )
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=False)
        return trainer, module

    return run


def test_grids_at_the_start_on_the_way_and_at_the_end(fit, tmp_path):
    _, module = fit(SampleGrid(prompts=2, seeds=2, every=2), steps=3)
    samples = tmp_path / "samples"
    names = [f"step_{step:06d}.png" for step in (0, 2, 3)]
    assert sorted(file.name for file in samples.iterdir()) == ["before_after.png", "last", *names]
    first, middle, last = (np.array(Image.open(samples / name)) for name in names)
    assert first.shape == last.shape and not np.array_equal(first, middle) and not np.array_equal(middle, last)


def test_a_grid_shows_held_out_prompts_with_fixed_seeds(fit):
    grid = SampleGrid(prompts=2, seeds=2)
    trainer, module = fit(grid, steps=1)
    images = grid._draw(trainer, module)
    alone = module.sample([PROMPTS[10]], [fixed_seed(3)])
    assert images.shape == (2, 2, 3, 16, 16) and torch.allclose(images[1, 1], alone[0], atol=1e-5)


def test_no_grid_is_drawn_twice_where_a_step_takes_several_batches(fit, monkeypatch, tmp_path):
    drawn = []
    (tmp_path / "samples").mkdir()
    monkeypatch.setattr(
        SampleGrid, "_save", lambda self, trainer, module: drawn.append(trainer.global_step) or torch.zeros(1, 1, 3, 16, 16)
    )
    fit(SampleGrid(prompts=1, seeds=1, every=1), steps=2, accumulate_grad_batches=2)
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("options", [{"prompts": 0}, {"seeds": 0}, {"every": -1}])
def test_empty_grids_are_refused(options):
    with pytest.raises(ValueError, match="at least 1, 1 and 0"):
        SampleGrid(**options)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_before_and_after_are_held_out_prompts_with_the_same_seeds(batch_size, fit):
    scores = BeforeAfter(batch_size=batch_size)
    _, module = fit(scores, steps=2)
    rows = scores.scores.rows
    assert [row["prompt"] for row in rows] == PROMPTS[9:] * 2
    assert [row["seed"] for row in rows[:3]] == [row["seed"] for row in rows[3:]] == [fixed_seed(1_000_000 + i) for i in range(3)]
    alone = module.sample(PROMPTS[9:10], [fixed_seed(1_000_000)])
    assert rows[3]["brightness"] == pytest.approx(alone.mean().item(), abs=1e-5)
    assert rows[3]["total"] == pytest.approx(10 * rows[3]["brightness"])
    metrics = scores.metrics()
    assert metrics["after"]["total"] > metrics["before"]["total"]
    assert metrics["before"]["total"] == pytest.approx(np.mean([row["total"] for row in rows[:3]]))


def test_before_scores_survive_a_resume(fit, tmp_path):
    first = BeforeAfter()
    fit(first, CleanStop(), steps=1, saving=True)
    second = BeforeAfter()
    fit(second, CleanStop(), steps=2, saving=True, ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert second.scores.rows[:3] == first.scores.rows[:3] and len(second.scores.rows) == 6
    assert second.metrics()["after"] != first.metrics()["after"]


def test_throughput_counts_samples(fit, monkeypatch):
    logged = []
    monkeypatch.setattr(tc.TextCraftor, "log", lambda self, name, value, **options: logged.append((name, value)))
    clock = iter(range(100))
    monkeypatch.setattr("tc_lightning.callbacks.time.monotonic", lambda: float(next(clock)))
    fit(Throughput(every=2), steps=4, accumulate_grad_batches=2)
    rates = [value for name, value in logged if name == "perf/samples_per_second"]
    assert rates == [8.0, 8.0]  # 2 steps of 2 batches of 2 prompts in a second


class Signal(Callback):
    """Sends this process a signal in the given batch."""

    def __init__(self, number, batch):
        self.number, self.batch, self.ended = number, batch, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            signal.raise_signal(self.number)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended.append(batch_idx)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number, fit, tmp_path, capsys):
    sender = Signal(number, batch=1)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        fit(sender, CleanStop(), steps=6, saving=True)
    assert getattr(stop.value, "code", 1) != 0
    assert f"{number.name}: the run ends after this step" in capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2 and sender.ended == [0, 1]


def test_a_stop_waits_for_all_batches_of_the_step(fit, tmp_path):
    sender = Signal(signal.SIGINT, batch=2)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(sender, CleanStop(), steps=6, saving=True, accumulate_grad_batches=3)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 1 and sender.ended == [0, 1, 2]
    sender = Signal(signal.SIGINT, batch=3)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(sender, CleanStop(), steps=6, saving=True, accumulate_grad_batches=3)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2 and sender.ended == [0, 1, 2, 3, 4, 5]


def test_a_second_signal_ends_at_once(fit, tmp_path):
    class Twice(Signal):
        def on_train_batch_start(self, *args):
            super().on_train_batch_start(*args)
            super().on_train_batch_start(*args)

    sender = Twice(signal.SIGINT, batch=1)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(sender, CleanStop(), steps=6, saving=True)
    assert sender.ended == [0] and not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_slurms_signal_saves_and_has_the_job_requeued(fit, tmp_path, monkeypatch):
    """`#SBATCH --signal=SIGUSR1@90`; scontrol is a script here that writes down what it was asked."""
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(Signal(signal.SIGUSR1, batch=1), CleanStop(), steps=6, saving=True)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (tmp_path / "asked").read_text() == "requeue 40_7\n"


@pytest.mark.parametrize("broken", [False, True])
def test_signals_are_pythons_again_afterwards(broken, fit):
    class Break(Callback):
        def on_train_batch_end(self, *args):
            if broken:
                raise RuntimeError("broken")

    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            fit(Break(), CleanStop(), saving=True)
    else:
        fit(Break(), CleanStop(), saving=True)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_last_and_best_are_the_only_files(fit, tmp_path):
    """A finished run's last.ckpt is of its last step, whatever the cadence."""
    fit(*checkpoints(tmp_path / "checkpoints", every=2, monitor=None), CleanStop(), steps=3, saving=True)
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert [callback.filename for callback in checkpoints(tmp_path, 5, "val/total")] == ["last", "best"]
