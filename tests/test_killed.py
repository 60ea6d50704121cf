"""SIGKILL at seeded moments, in the middle of epochs and of checkpoint writes: what follows is the uninterrupted run."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import SMALL
from test_resume import assert_same_run

HERE = Path(__file__).resolve().parent
# 10 prompts in batches of 2: 5 steps an epoch
OPTIONS = (*SMALL, "prompts.train=10", "checkpoint_every=2", "val.every=0", "~callbacks.progress", "lr_scheduler=cosine")
QUICK = ("~callbacks.before_after", "~callbacks.sample_grid")
SLOW = 3.0  # seconds that a checkpoint's write takes where a kill is to fall into it


def start(root, folder, steps, *more, slow=0.0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "killed_run.py"), str(folder / "batches.jsonl"), str(slow), "train", *OPTIONS]
    command += [f"max_steps={steps}", f"hydra.run.dir={folder}", *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def batches(folder) -> list:
    file = folder / "batches.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait(process, until):
    began = time.monotonic()
    while not until():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < 900
        time.sleep(0.01)


def killed(root, folder, steps, moment, kind, *more):
    """Start or resume the run and kill it: `moment` batches on, within the epoch, or within the next checkpoint's write."""
    done = len(batches(folder))
    resume = ["ckpt_path=last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    if not resume and (folder / "run.json").exists():
        (folder / "run.json").unlink()  # nothing was saved yet: the run starts again
    process = start(root, folder, steps, *resume, *more, slow=SLOW if kind == "write" else 0.0)
    wait(process, lambda: len(batches(folder)) >= done + moment)
    if kind == "write":
        part = folder / "checkpoints" / "last.ckpt.part"
        wait(process, lambda: part.exists() and part.stat().st_size >= 900_000)
        time.sleep(0.2)
    process.kill()
    process.communicate()
    if kind == "write":
        assert part.exists(), "the kill was to fall into a write"
    last = folder / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.exists() else 0


def through(root, tmp_path, kills, steps, *more):
    """Kill a run again and again, let it finish; then compare with one that was left alone."""
    run, whole = tmp_path / "killed", tmp_path / "whole"
    run.mkdir()
    whole.mkdir()
    kept, redone = [], 0
    for moment, kind in kills:
        reached = killed(root, run, steps, moment, kind, *more)
        lines = batches(run)
        kept = [line for line in kept + lines[len(kept) + redone :] if line[0] < reached]
        redone = len(lines) - len(kept)
    begun = len(batches(run))
    resume = ["ckpt_path=last"] if (run / "checkpoints" / "last.ckpt").exists() else []
    for process in (start(root, run, steps, *resume, *more), start(root, whole, steps, *more)):
        shown, _ = process.communicate(timeout=900)
        assert process.returncode == 0, shown
    expected = batches(whole)
    assert [line[0] for line in expected] == list(range(steps))
    assert kept + batches(run)[begun:] == expected
    by_step = {line[0]: line for line in expected}
    assert all(by_step[line[0]] == line for line in batches(run))  # what was done twice was the same twice
    one, two = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return run, whole


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_killed_in_mid_epoch_and_in_a_write_a_run_is_the_same(tmp_path, root):
    kills = [(4, "epoch"), (1, "write")]
    through(root, tmp_path, kills, 8, *QUICK)


def seeded_kills(seed: int, count: int) -> list[tuple[int, str]]:
    """(batches until the kill, where it falls); at least 3 in a write and 3 in mid-epoch."""
    draw = random.Random(seed)
    kinds = ["write"] * 3 + ["epoch"] * 3 + [draw.choice(("write", "epoch")) for _ in range(count - 6)]
    draw.shuffle(kinds)
    return [(draw.randint(1, 4), kind) for kind in kinds]


def test_seeded_kills_are_what_is_promised():
    kills = seeded_kills(0, 10)
    assert kills == seeded_kills(0, 10) and len(kills) == 10
    kinds = [kind for _, kind in kills]
    assert min(kinds.count("write"), kinds.count("epoch")) >= 3


@pytest.mark.extended
@pytest.mark.timeout(7200)
def test_ten_seeded_kills_leave_no_trace(tmp_path, root):
    """As the first test, with scores, grids and metrics too; 10 kills, of which at least 3 fall into a write."""
    run, whole = through(root, tmp_path, seeded_kills(0, 10), 24)
    assert_same_run(run, whole)
