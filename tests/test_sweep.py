"""Sweeps: a process and a device a job, a failed job that ends nothing, a killed sweep that goes on, the table."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import SMALL, door

from tc_lightning import sweep
from tc_lightning.sweep import Pool, _take_up, group
from tc_lightning.sweep_table import Job, read_job, read_sweep, write_tables

HERE = Path(__file__).resolve().parent
STUB = (sys.executable, str(HERE / "stub_job.py"))


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(sweep, "DOOR", STUB)


def log(folder) -> list[dict]:
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(folder) -> dict[str, dict]:
    with (folder / "sweep.csv").open(newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def test_a_pool_hands_each_device_out_once_at_a_time():
    pool, seen, most = Pool(["0", "1", "5"]), [], []

    def use(count):
        taken = pool.take(count)
        seen.append(taken)
        most.append(3 - len(pool._free))
        time.sleep(0.01)
        pool.give(taken)

    threads = [threading.Thread(target=use, args=(1 + number % 3,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(seen) == 12 and sorted(pool._free) == ["0", "1", "5"] and max(most) <= 3
    assert all(len(set(taken)) == len(taken) for taken in seen)
    with pytest.raises(ValueError, match="the job wants 4 devices .* the pool has 3"):
        pool.take(4)


def test_every_job_has_its_gpus_and_none_is_shared(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.3")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of a process that has nothing to do with the jobs
    words = ("trainer=gpu", "trainer.devices=1,2", "seed=0,1", "hydra.launcher.devices=[3,4,6]")
    done = door("train", "-m", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.status == 0, done.err
    jobs = log(tmp_path / "sweep")
    assert len(jobs) == 4 and "4 finished" in done.out
    for job in jobs:
        wanted = 2 if "trainer.devices=2" in job["words"] else 1
        assert len(job["gpus"].split(",")) == wanted and set(job["gpus"].split(",")) <= {"3", "4", "6"}
        assert job["rank"] is None and "hydra.mode=RUN" in job["words"] and job["group"] == group(tmp_path / "sweep")
        beside = [other for other in jobs if other is not job and abs(other["began"] - job["began"]) < 0.2]
        assert not any(set(job["gpus"].split(",")) & set(other["gpus"].split(",")) for other in beside)


def test_failed_jobs_end_nothing_and_are_named(stub, tmp_path):
    place = tmp_path / "a sweep's"
    done = door("train", "-m", "seed=1,3,4,2", "reward=[tiny_clip]", f"hydra.sweep.dir='{str(place)}'".replace("'s", "\\'s"))
    assert done.status == 0, done.err
    rows = table(place)
    assert [row["status"] for row in rows.values()] == ["finished", "failed", "failed", "finished"]
    assert rows["1"]["error"] == "this job fails on purpose" and "killed by SIGABRT" in rows["2"]["error"]
    assert rows["3"]["seed"] == "2" and float(rows["3"]["after total"]) == 3.0 and "reward" not in rows["3"]
    shown = (place / "sweep.md").read_text()
    assert "4 jobs: 2 finished, 2 failed" in shown and "- 1: seed=3: this job fails on purpose" in shown
    assert "4 jobs: 2 finished, 2 failed" in done.out and "1: seed=3: failed" in done.out and "go on" in done.out


@pytest.mark.full
def test_a_sweep_that_is_killed_goes_on_with_the_jobs_that_are_missing(tmp_path, root):
    """SIGKILL to the sweep after its second job; the same command then runs what is missing and tries the failed one again."""
    place = tmp_path / "sweep"
    code = f"import tc_lightning.sweep as s; s.DOOR = {STUB!r}\nfrom tc_lightning.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "-m", "seed=0,3,1,2,5,6", f"hydra.sweep.dir={place}"]
    environment = {**os.environ, "PYTHONPATH": str(root), "STUB_SECONDS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(log(place)) < 3:
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(2)  # the stub ignores that its sweep is gone and finishes
    statuses = [job.status for job in read_sweep(place)]
    assert statuses[:2] == ["finished", "failed"] and statuses[3:] == ["missing"] * 3
    assert len(json.loads((place / "jobs.json").read_text())) == 6
    before = len(log(place))
    done = subprocess.run(command, env={**environment, "STUB_SECONDS": "0"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "6 jobs: 5 finished, 1 failed" in done.stdout
    again = [job["job"] for job in log(place)[before:]]
    assert "0" not in again and again[0] == "1" and set(again) >= {"1", "3", "4", "5"}
    rows = table(place)
    assert [row["status"] for row in rows.values()] == ["finished", "failed", *["finished"] * 4]
    assert rows["1"]["error"] == "this job fails on purpose"
    assert [row["seed"] for row in rows.values()] == ["0", "3", "1", "2", "5", "6"]


@pytest.mark.full
def test_optuna_climbs_what_jobs_give_and_its_sweep_goes_on(stub, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra sweep is not installed")
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=tpe", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_jobs=1"]
    words += ["hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0", "seed=range(0,6)"]
    first = door("train", "-m", *words, "hydra.sweeper.n_trials=4", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert first.status == 0, first.err
    begun = len(log(tmp_path / "sweep"))
    done = door("train", "-m", *words, "hydra.sweeper.n_trials=8", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.status == 0, done.err
    rows = table(tmp_path / "sweep")
    failed = sum(row["status"] == "failed" for row in rows.values())
    assert len(rows) == 8 and begun == 4
    tried_again = sum(row["status"] == "failed" for row in list(rows.values())[:4])
    assert len(log(tmp_path / "sweep")) - begun == 4 + tried_again  # the finished ones were told to Optuna, not run again
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    values = [json.loads((tmp_path / "sweep" / name / "run.json").read_text()).get("objective") for name in rows]
    assert f"best_value: {max(value for value in values if value is not None)}" in best and failed < 8


def job(folder, overrides, status, saved):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"overrides": overrides, "status": status}))
    if saved:
        (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    return read_job(folder)


def test_a_job_is_taken_up_where_it_was_and_nothing_is_overwritten(tmp_path):
    assert _take_up(tmp_path / "0", ["seed=1"], Job(tmp_path / "0", ["seed=1"])) == []
    stopped = job(tmp_path / "1", ["seed=1", "ckpt_path=last"], "interrupted", saved=True)
    assert _take_up(tmp_path / "1", ["seed=1"], stopped) == ["ckpt_path=last"]
    for words, saved, name in ((["seed=1"], False, "2"), (["seed=2"], True, "3")):
        before = job(tmp_path / name, ["seed=1"], "running", saved)
        assert _take_up(tmp_path / name, words, before) == []
        assert not (tmp_path / name).exists() and read_job(tmp_path / f"{name}.old1").status == "running"


def test_a_table_of_what_is_there(tmp_path):
    job(tmp_path / "10", ["seed=2", "schedule=full"], "finished", saved=False)
    job(tmp_path / "9", ["seed=1", "schedule=full"], "running", saved=False)
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "run.json").write_text("{broken")
    (tmp_path / "9.old1").mkdir()
    assert [job.folder.name for job in write_tables(tmp_path)] == ["8", "9", "10"]
    rows = table(tmp_path)
    assert [row["status"] for row in rows.values()] == ["missing", "running", "finished"] and rows["10"]["seed"] == "2"
    assert not (tmp_path / "contact_sheet.png").exists()


@pytest.mark.parametrize("words", [("hydra.launcher.jobs=0",), ("trainer=gpu", "trainer.devices=3", "hydra.launcher.devices=[0]")])
def test_what_a_pool_cannot_do_is_said(words, stub, tmp_path):
    done = door("train", "-m", "seed=0,1", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert "Traceback" not in done.err
    assert "jobs=0, accepted: 1 or more" in done.err or "the job wants 3 devices (trainer.devices), the pool has 1" in done.out


@pytest.mark.full
def test_a_job_of_the_sweeps_own_process_fails_alone_and_may_not_have_processes(tmp_path):
    """hydra/launcher=basic, and joblib and submitit likewise: errors are written down, the sweep goes on."""
    words = ("hydra/launcher=basic", "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "prompts.train=4")
    done = door(
        "train",
        "-m",
        *SMALL,
        *words,
        "trainer.devices=1,2",
        "max_steps=0,1",
        "prompts.batch_size=8",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert done.status == 0, done.err
    errors = [job.error for job in read_sweep(tmp_path / "sweep")]
    assert [("max_steps=0" in e, "needs hydra/launcher=pool" in e, "do not fill one batch" in e) for e in errors] == [
        (True, False, False),
        (True, False, False),
        (False, False, True),
        (False, True, False),
    ]


REAL = (*SMALL, "max_steps=3", "checkpoint_every=1", "~callbacks.progress", "hydra.launcher.jobs=2")


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_six_real_jobs_one_failing_killed_half_way_and_continued(tmp_path, root):
    """With jobs of two processes among them; the jobs that were running when the sweep was killed save, and resume."""
    place = tmp_path / "sweep"
    words = [*REAL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=1,2"]
    words += ["prompts.batch_size=1", "optimizer.lr=1e-4,2e-4,-1"]
    command = [sys.executable, "-m", "tc_lightning", "train", "-m", *words, f"hydra.sweep.dir={place}"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    began = time.monotonic()
    while not (place / "1" / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() - began < 900
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert "6 jobs: 4 finished, 2 failed" in done.stdout
    rows = table(place)
    assert {row["optimizer.lr"] for row in rows.values() if row["status"] == "failed"} == {"-1"}
    assert (place / "contact_sheet.png").is_file()
    # a job of two processes is not the one of one process with half the batch, but starts from the same model
    assert len({row["before total"] for row in rows.values() if row["status"] == "finished"}) == 1
