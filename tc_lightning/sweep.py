"""Sweeps: Hydra's launcher that gives each job a process and a device of its own, and the table when all have ended."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from tc_lightning.sweep_table import Job, counts, label, read_job, read_record, read_sweep, without_resume, write_tables

log = logging.getLogger(__name__)
POOL_JOB = "TC_LIGHTNING_POOL_JOB"  # told to a job: it ends when its standard input does
DOOR = (sys.executable, "-m", "tc_lightning")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
SWEEPS_OWN = ("hydra.sweep", "hydra.mode", "hydra.run.dir", "hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper")


class Pool:
    """Devices that jobs take and give back.

    Args:
        devices: ids as in CUDA_VISIBLE_DEVICES; none on a machine without GPUs.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.devices, self._free, self._changed = list(devices), list(devices), threading.Condition()

    def take(self, count: int) -> list[str]:
        """`count` devices, once so many are free.

        Raises:
            ValueError: more than there are.
        """
        if count > len(self.devices):
            raise ValueError(f"the job wants {count} devices (trainer.devices), the pool has {len(self.devices)}")
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) >= count)
            taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, devices: Sequence[str]) -> None:
        """Back to the pool."""
        with self._changed:
            self._free += devices
            self._changed.notify_all()


def gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    import torch

    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]


class PoolLauncher(Launcher):
    """Each job as a process of its own, side by side as far as there are devices.

    A job that crashes ends alone, and a job of several processes can be part of a sweep. With the same sweep folder
    (hydra.sweep.dir) a sweep that was killed goes on: finished jobs stay, stopped ones resume, the others start.

    Args:
        jobs: at most so many side by side; by default one a GPU, or one where there is none.
        devices: ids of GPUs; by default those that this process may use.
        retry_failed: whether jobs that failed before are tried again in a sweep that goes on.
    """

    __module__ = "hydra_plugins.tc_lightning"  # see register

    def __init__(self, jobs: int | None = None, devices: Sequence[Any] | None = None, retry_failed: bool = True) -> None:
        if jobs is not None and jobs < 1:
            raise ValueError(f"hydra.launcher.jobs={jobs}, accepted: 1 or more")
        self.jobs, self.retry_failed = jobs, retry_failed
        self.given = None if devices is None else [str(device) for device in devices]
        self._running: dict[int, subprocess.Popen] = {}
        self._stopping = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra hands over."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; a failed one returns None, so that neither Hydra nor Optuna ends the sweep."""
        folder = Path(str(self.config.hydra.sweep.dir)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        numbered = {initial_job_idx + place: list(words) for place, words in enumerate(job_overrides)}
        self._common = set.intersection(*map(set, numbered.values())) if len(numbered) > 1 else set()
        _plan(folder, numbered)
        pool = Pool(gpus() if self.given is None else self.given)
        side_by_side = self.jobs or max(1, len(pool.devices))
        before = signal.signal(signal.SIGTERM, _as_interrupt)
        try:
            with ThreadPoolExecutor(side_by_side) as threads:
                running = [threads.submit(self._job, folder / str(number), words, pool) for number, words in numbered.items()]
                try:
                    return [future.result() for future in running]
                except KeyboardInterrupt:
                    self._stop(running)
                    raise
        finally:
            signal.signal(signal.SIGTERM, before)
            write_tables(folder)

    def _stop(self, waiting: Sequence[Any]) -> None:
        self._stopping = True
        for future in waiting:
            future.cancel()
        for process in list(self._running.values()):
            process.terminate()  # saves after its step

    def _job(self, folder: Path, words: list[str], pool: Pool) -> JobReturn:
        job = read_job(folder, words)
        if job.status == "finished" and job.overrides == words:
            log.info(f"job {folder.name} has finished already: {self._said(words)}")
            return self._returned(folder, words)
        if job.status == "failed" and job.overrides == words and not self.retry_failed:
            return self._returned(folder, words)
        if self._stopping:
            return self._returned(folder, words)
        try:
            devices = pool.take(self._count(words, len(pool.devices)))
        except ValueError as error:
            _record_failure(folder, words, str(error))
            return self._returned(folder, words)
        try:
            self._run(folder, words, job, devices)
        finally:
            pool.give(devices)
        return self._returned(folder, words)

    def _count(self, words: list[str], available: int) -> int:
        """GPUs that a job wants, of its own settings."""
        composed = self.context.config_loader.load_sweep_config(self.config, words)
        trainer = composed.get("trainer") or {}
        if str(trainer.get("accelerator", "auto")) in ("cpu", "mps") or not available:
            return 0
        wanted = trainer.get("devices", 1)
        return wanted if isinstance(wanted, int) and wanted > 0 else available

    def _run(self, folder: Path, words: list[str], before: Job, devices: list[str]) -> None:
        more = _take_up(folder, words, before)
        folder.mkdir(parents=True, exist_ok=True)
        own = [word for word in OmegaConf.to_container(self.config.hydra.overrides.hydra) if not _of_sweep(word)]
        place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        command = [*DOOR, str(self.config.hydra.job.name), *words, *more, *own, "hydra.mode=RUN", f"hydra.run.dir='{place}'"]
        began = time.monotonic()
        where = f" on GPU {','.join(devices)}" if devices else ""
        log.info(f"job {folder.name} begins{where}: {self._said(words)}")
        with (folder / "job.log").open("a", encoding="utf-8") as shown:
            streams = {"stdin": subprocess.PIPE, "stdout": shown, "stderr": subprocess.STDOUT}
            # a session of its own: Ctrl-C comes through this process, once
            environment = self._environment(folder.parent, devices)
            process = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
            self._running[process.pid] = process
            process.wait()
        self._running.pop(process.pid, None)
        if process.returncode and read_record(folder).get("status") not in ("failed", "interrupted"):
            _record_failure(folder, words, _last_error(folder / "job.log", process.returncode))
        ended = read_job(folder, words)
        log.info(f"job {folder.name} {ended.status} after {time.monotonic() - began:.0f} s {ended.error}".rstrip())

    def _said(self, words: list[str]) -> str:
        return " ".join(word for word in words if word not in self._common)

    def _environment(self, sweep: Path, devices: list[str]) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in RANKS}
        package = str(Path(__file__).resolve().parent.parent)  # so that a checkout that is not installed works too
        path = os.pathsep.join(part for part in (package, kept.get("PYTHONPATH")) if part)
        own = {POOL_JOB: "1", "PYTHONPATH": path, "WANDB_RUN_GROUP": kept.get("WANDB_RUN_GROUP") or group(sweep)}
        return kept | own | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {})

    def _returned(self, folder: Path, words: list[str]) -> JobReturn:
        result = JobReturn(overrides=words, working_dir=str(folder), task_name=str(self.config.hydra.job.name))
        result.status, result.return_value = JobStatus.COMPLETED, read_record(folder).get("objective")
        return result


def group(sweep: Path) -> str:
    """What wandb groups the jobs of a sweep by."""
    return "/".join(sweep.resolve().parts[-2:])


def _of_sweep(word: str) -> bool:
    return word.lstrip("+~").startswith(SWEEPS_OWN)


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _plan(folder: Path, numbered: dict[int, list[str]]) -> None:
    """jobs.json: what the sweep consists of, so that a job that never began is in the table too."""
    file = folder / "jobs.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known |= {str(number): words for number, words in numbered.items()}
    part = folder / "jobs.json.part"
    part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(part, file)


def _take_up(folder: Path, words: list[str], before: Job) -> list[str]:
    """How a job that began before goes on; what belongs to other settings is moved aside, never overwritten."""
    if before.status == "missing":
        return []
    if without_resume(before.overrides) == words and (folder / "checkpoints" / "last.ckpt").is_file():
        return ["ckpt_path=last"]
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(aside)
    return []


def _record_failure(folder: Path, words: list[str], message: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"verb": "train", "overrides": words, **read_record(folder), "status": "failed", "error": message}
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _last_error(shown: Path, code: int) -> str:
    """The job's own words, or how it ended."""
    lines = [line for line in shown.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return said[-1] if said else f"{ended}; the last line of {shown}: {lines[-1] if lines else 'none'}"


class SweepTable(Callback):
    """Hydra's callback that writes sweep.csv, sweep.md and contact_sheet.png when a sweep ends, whatever launched it."""

    def on_multirun_end(self, config: DictConfig, **options: Any) -> None:
        """Write and say where."""
        folder = Path(str(config.hydra.sweep.dir)).resolve()
        jobs = write_tables(folder)
        print(f"\n{counts(jobs)}")
        for index, job in enumerate(read_sweep(folder)):
            if job.status != "finished":
                print(f"  {label(jobs, index)}: {job.status} {job.error}".rstrip())
        print(f"sweep folder  {folder}\ntable         {folder / 'sweep.md'}")
        if any(job.status != "finished" for job in jobs):
            print(f"go on         the same command with hydra.sweep.dir={folder}")


def register() -> None:
    """Make the launcher known to Hydra, which takes plugins of the package hydra_plugins alone.

    Its module is made here rather than found by Hydra's search: so it is there in a checkout that is not installed too.
    """
    Plugins.instance().register(PoolLauncher)
    for name in ("hydra_plugins", PoolLauncher.__module__):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = ModuleType(name)
    sys.modules[PoolLauncher.__module__].PoolLauncher = PoolLauncher


def end_with_parent() -> None:
    """In a job: end as if asked (SIGTERM) when the sweep is gone, so that it can be continued elsewhere at once."""
    if os.environ.pop(POOL_JOB, None):  # popped: processes that this job starts are watched by it

        def watch() -> None:
            while os.read(0, 1):  # not sys.stdin, whose lock this thread would hold when Python ends
                pass
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True, name="sweep-watch").start()
