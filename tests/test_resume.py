"""A run that was stopped and goes on equals one that was not, bit for bit: weights, optimizer, losses and data."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import SMALL, door, kept, refused, train

# 6 prompts in batches of 2: an epoch ends after step 3, between the two halves of a run of 2 + 2 steps
SHORT = ("prompts.train=6", "checkpoint_every=1")


def state(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [(int(row["step"]), row["train/loss"], row["train/grad_norm"]) for row in rows]


def values(folder, key):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row[key]) for row in csv.DictReader(file) if row.get(key)]


def equal(one, two):
    """Trees of tensors and numbers, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(one, two):
    first, second = state(one), state(two)
    assert first["global_step"] == second["global_step"]
    assert equal(first["state_dict"], second["state_dict"])
    assert equal(first["optimizer_states"], second["optimizer_states"])
    assert losses(one) == losses(two)
    before, after = (json.loads((folder / "run.json").read_text())["metrics"] for folder in (one, two))
    assert before == after and set(before) == {"before", "after"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def four(tmp_path_factory):
    """4 steps without a stop."""
    return kept(tmp_path_factory.getbasetemp() / "four", *SHORT, "max_steps=4")


@pytest.fixture
def seven(tmp_path_factory):
    """7 steps without a stop, through the ends of two epochs."""
    return kept(tmp_path_factory.getbasetemp() / "seven", *SHORT, "max_steps=7")


COSINE = (*SHORT, "max_steps=7", "lr_scheduler=cosine", "lr_scheduler.num_warmup_steps=2")


@pytest.fixture
def cosine(tmp_path_factory):
    """The same with a learning rate that changes at every step."""
    return kept(tmp_path_factory.getbasetemp() / "cosine", *COSINE)


@pytest.mark.full
@pytest.mark.parametrize("first", [2, 3])
def test_two_and_two_steps_equal_four(first, four, tmp_path):
    """Stopped in the middle of an epoch, and at its very end (after 3)."""
    run = tmp_path / "run"
    card = train(run, *SHORT, f"max_steps={first}")
    assert card["steps"] == first
    card = train(run, *SHORT, "max_steps=4", "ckpt_path=last")
    assert card["steps"] == 4 and card["status"] == "finished"
    assert_same_run(run, four)


@pytest.mark.full
def test_a_run_may_stop_often(seven, tmp_path):
    """In the first epoch, at its end and beyond, with workers: epochs end in between, and nothing is drawn twice or left out."""
    run = tmp_path / "run"
    train(run, *SHORT, "max_steps=1", "val.every=1000")
    for steps in (3, 5, 7):
        train(run, *SHORT, f"max_steps={steps}", "ckpt_path=last", "prompts.workers=2", "val.every=1000")
    assert_same_run(run, seven)


@pytest.mark.full
def test_accumulated_batches_resume(tmp_path):
    """Two batches a step, and an epoch of three batches: a step takes from two epochs."""
    options = (*SHORT, "trainer.accumulate_grad_batches=2", "val.every=1000")
    train(tmp_path / "whole", *options, "max_steps=4")
    train(tmp_path / "parts", *options, "max_steps=1")
    for steps in (2, 4):
        train(tmp_path / "parts", *options, f"max_steps={steps}", "ckpt_path=last")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.full
def test_lora_resumes(tmp_path):
    options = (*SHORT, "tune.text_encoder=lora", "tune.rank=2", "optimizer.lr=0.001")
    train(tmp_path / "whole", *options, "max_steps=3")
    train(tmp_path / "parts", *options, "max_steps=1")
    train(tmp_path / "parts", *options, "max_steps=3", "ckpt_path=last")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.full
def test_validation_keeps_its_cadence(tmp_path):
    """After steps 2 and 4, whether or not the run was stopped between."""
    train(tmp_path / "whole", *SHORT, "max_steps=5", "val.every=2")
    train(tmp_path / "parts", *SHORT, "max_steps=3", "val.every=2")
    train(tmp_path / "parts", *SHORT, "max_steps=5", "val.every=2", "ckpt_path=last")
    assert values(tmp_path / "whole", "val/total") == values(tmp_path / "parts", "val/total")
    assert [step for step, _ in values(tmp_path / "whole", "val/total")] == ["1", "3"]


@pytest.mark.full
def test_a_checkpoint_of_another_run_is_one_clear_error(four, tmp_path):
    last = four / "checkpoints" / "last.ckpt"
    run = (*SMALL, f"ckpt_path={last}", f"hydra.run.dir={tmp_path / 'run'}")
    refused(door("train", *run, "tune.text_encoder=lora"), "ckpt_path continues a run", "tune.text_encoder was full and is lora")


def start(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tc_lightning", "train", *SMALL, *COSINE, f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, folder):
    """Until the first step's row is in metrics.csv; the process must still run."""
    began = time.monotonic()
    while not ((folder / "metrics.csv").exists() and losses(folder)):
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.05)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_says_how_to_resume_and_ends_with_an_error(number, cosine, tmp_path, monkeypatch, root):
    monkeypatch.setenv("PYTHONPATH", str(root))
    run = tmp_path / "a run"
    process = start(run)
    wait_for_step(process, run)
    process.send_signal(number)
    shown, _ = process.communicate(timeout=200)
    assert process.returncode != 0, shown
    assert f"{number.name}: the run ends after this step" in shown and "Traceback" not in shown
    card = json.loads((run / "run.json").read_text())
    assert card["status"] == "interrupted" and 1 <= card["steps"] < 7 and state(run)["global_step"] == card["steps"]
    assert len(losses(run)) == card["steps"] and not (run / "text_encoder").exists()

    (command,) = re.findall(r"^resume +python -m tc_lightning (.*)$", shown, re.MULTILINE)
    done = door(*shlex.split(command))
    assert done.status == 0, done.err
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert_same_run(run, cosine)


@pytest.mark.full
def test_a_run_that_is_killed_resumes_from_its_last_checkpoint(cosine, tmp_path, monkeypatch, root):
    monkeypatch.setenv("PYTHONPATH", str(root))
    run = tmp_path / "run"
    process = start(run)
    wait_for_step(process, run)
    process.kill()
    process.communicate(timeout=60)
    card = train(run, *COSINE, "ckpt_path=last")
    assert card["status"] == "finished"
    assert_same_run(run, cosine)


@pytest.mark.full
def test_a_reward_that_is_not_finite_ends_the_run_with_its_name(tmp_path, monkeypatch):
    from tc_lightning.rewards.pickscore import PickScore

    score, calls = PickScore.score, []

    def broken(self, images, prompts):
        calls.append(1)
        return score(self, images, prompts) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(PickScore, "score", broken)
    done = door("train", *SMALL, *SHORT, "prompts.heldout=2", "max_steps=4", f"hydra.run.dir={tmp_path / 'run'}")
    refused(done, "reward tiny_preference gave nan for the prompt")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C is Python's own again
        signal.raise_signal(signal.SIGINT)
