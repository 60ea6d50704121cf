"""Two processes, one run: the gradient, data, noise and scores of one process; what becomes of a run that loses a process."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, door, refused, train

from tc_lightning.prompts import PromptData

HERE = Path(__file__).resolve().parent
DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", "prompts.batch_size=1")
RUN = (*SMALL, "max_steps=4", "checkpoint_every=1", "prompts.train=6", "val.every=4")


def environment(root, **more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{HERE}", "PYTHONUNBUFFERED": "1", **more}


def free_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def cases(root, tmp_path_factory):
    """[one process, process 0 of 2, process 1 of 2], each {case: what two_processes.fit gives}; torchrun's environment."""
    folder = tmp_path_factory.mktemp("processes")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    envs = {"one": {}, "two/0": {"RANK": "0", "LOCAL_RANK": "0"}, "two/1": {"RANK": "1", "LOCAL_RANK": "1"}}
    started = []
    for name, own in envs.items():
        place = folder / name.partition("/")[0]
        place.mkdir(exist_ok=True)
        command = [sys.executable, str(HERE / "two_processes.py"), str(place)]
        env = environment(root, **({**shared, **own} if own else {}))
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in started:
        shown, _ = process.communicate(timeout=240)
        assert process.returncode == 0, shown
    return [torch.load(folder / f"{place}.pt", weights_only=True) for place in ("one/0", "two/0", "two/1")]


def difference(one, two):
    """|one - two| / |one| of gradients by name."""
    apart = torch.cat([(one[name].double() - two[name].double()).flatten() for name in one])
    return float(apart.norm() / torch.cat([value.double().flatten() for value in one.values()]).norm())


@pytest.mark.full
# batches of one and of two prompts round differently in the UNet: an accumulated step takes halves of what two processes take;
# and DDPO divides rewards that differ in their last digits by their small deviation (missing any synchronisation is 0.1 or more)
@pytest.mark.parametrize(("case", "bound"), [("text", 1e-6), ("unet", 1e-6), ("accumulated", 5e-6), ("ddpo", 1e-4)])
def test_the_gradient_of_two_processes_is_that_of_one_with_twice_the_batch(case, bound, cases):
    one, first, second = (found[case]["gradients"] for found in cases)
    assert len(one) == len(first) == {"text": 3, "ddpo": 2}.get(case, 1)
    for whole, mine, theirs in zip(one, first, second, strict=True):
        assert difference(whole, mine) < bound
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.full
def test_prompts_and_noise_are_the_same_however_many_processes(cases):
    one, first, second = (found["text"]["rows"] for found in cases)
    assert len(one) == 3 and [len(rows) for rows in one] == [4] * 3
    assert [mine + theirs for mine, theirs in zip(first, second, strict=True)] == one


@pytest.mark.full
def test_rewards_reduce_over_uneven_shares_and_logs_are_of_all(cases):
    one, first, second = cases
    assert torch.allclose(one["text"]["rewards"]["preference"], first["text"]["rewards"]["preference"], rtol=1e-6)
    assert first["text"]["rewards"] == second["text"]["rewards"]
    assert first["text"]["logged"] == pytest.approx(one["text"]["logged"], rel=1e-5)


def test_every_process_needs_a_dev_prompt():
    class Trainer:
        global_rank, world_size = 0, 4

    data = PromptData(["a", "b"], dev=["c", "d", "e"], batch_size=1)
    data.trainer = Trainer
    with pytest.raises(ValueError, match="3 dev prompts for 4 processes: val.prompts at least 4, or 0"):
        data.val_dataloader()


def test_processes_from_outside_need_a_folder_with_a_name(monkeypatch, tmp_path):
    """Each would call its folder by its own clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    refused(door("train", *SMALL), "several processes need one run folder", "hydra.run.dir=")


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")}


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def python_child(process) -> int:
    """The second process of a run."""
    (found,) = [pid for pid in children(process) if b"train_ddp_process_1" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the second process through /proc")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.extended), 1])
def test_a_run_that_loses_a_process_ends_within_a_minute_and_resumes(rank, tmp_path, root, monkeypatch):
    """The message names the process and the command that goes on; what comes then is the run of one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tc_lightning", "train", *RUN, *DDP, "max_steps=400", f"hydra.run.dir={run}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, env=environment(root), text=True, **streams)
    began = time.monotonic()
    while not ((run / "metrics.csv").exists() and losses(run)):
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.1)
    second = python_child(process)
    os.kill(process.pid if rank == 0 else second, signal.SIGKILL)
    killed = time.monotonic()
    shown, _ = process.communicate(timeout=60)  # the pipe closes when both are gone
    assert time.monotonic() - killed < 60
    assert process.returncode != 0 and "Traceback" not in shown, shown
    if rank == 0:
        assert re.search(r"error: process (0 of 2 is gone|1 of 2 lost another process)", shown), shown
    else:
        assert "error: process 1 of 2 was killed by SIGKILL: the run ends" in shown, shown
        card = json.loads((run / "run.json").read_text())
        assert card["status"] == "failed" and "SIGKILL" in card["error"]
        assert re.search(r"^resume +python -m tc_lightning train .*ckpt_path=last", shown, re.MULTILINE)

    # from here in one process: what two had done is the same run
    reached = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    card = train(run, *RUN[len(SMALL) :], f"max_steps={reached + 1}", "ckpt_path=last")
    assert card["status"] == "finished"
    whole = train(tmp_path / "whole", *RUN[len(SMALL) :], f"max_steps={reached + 1}")
    assert whole["status"] == "finished" and losses(run).keys() == losses(tmp_path / "whole").keys()
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_two_processes_asked_to_stop_save_together_and_resume_exactly(tmp_path, root, monkeypatch):
    """SIGTERM to the first process alone; two processes go on, and end with the weights of two that were left alone."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment(root)}

    def start(folder, *more):
        words = [*RUN, *DDP, "max_steps=8", "~callbacks.progress", f"hydra.run.dir={folder}", *more]
        return subprocess.Popen([sys.executable, "-m", "tc_lightning", "train", *words], **streams)

    run, whole = tmp_path / "run", tmp_path / "whole"
    process = start(run, "ckpt_path=auto")
    while not ((run / "metrics.csv").exists() and losses(run)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "SIGTERM: the run ends after this step" in shown and "Traceback" not in shown, shown
    card = json.loads((run / "run.json").read_text())
    assert card["status"] == "interrupted" and 1 <= card["steps"] < 8 and len(losses(run)) == card["steps"]
    for process in (start(run, "ckpt_path=auto"), start(whole)):
        shown, _ = process.communicate(timeout=600)
        assert process.returncode == 0, shown
    from test_resume import assert_same_run

    assert_same_run(run, whole)
