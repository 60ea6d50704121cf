"""Several processes, one run: which of them this is, and a run that ends when one of them is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

GRACE = 20.0  # seconds that a process gets to end by itself after another was lost
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Gloo", "gloo", "ProcessGroup")


class LostProcess(ChildProcessError):
    """Another process of this run ended while the run went on; the message says which, as far as is known."""


def started_from_outside() -> bool:
    """Whether torchrun or SLURM started this process as one of several, so that Lightning starts none."""
    tasks = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    return "TORCHELASTIC_RUN_ID" in os.environ or tasks.isdigit() and int(tasks) > 1


def how_ended(code: int) -> str:
    """`was killed by SIGKILL` or `ended with status 1`, of a process' return code."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


class RankWatch(Callback):
    """Ends the run within seconds when one of its processes is gone: backends notice late or never.

    The first process watches those it started, these watch the first. Under torchrun and SLURM nobody is started here and
    these do the watching.

    Args:
        lost: told the message before this process is ended, should it not end by itself (it may hang in a collective).
        every: seconds between looks.
    """

    def __init__(self, lost: Callable[[str], None] = print, every: float = 0.5) -> None:
        self.lost, self.every = lost, every
        self.message: str | None = None
        self._stop = threading.Event()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look."""
        launcher = trainer.strategy.launcher
        children = list(getattr(launcher, "procs", []))
        mine = not children and trainer.world_size > 1 and launcher is not None and not started_from_outside()
        if children or mine:
            _dismiss_observer()
            threading.Thread(target=self._watch, args=(children, trainer), daemon=True, name="rank-watch").start()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a process may end."""
        self._stop.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that is stopped ends all its processes."""
        if isinstance(exception, KeyboardInterrupt):
            self._stop.set()

    def _watch(self, children: list[Any], trainer: Trainer) -> None:
        parent, world = os.getppid(), trainer.world_size
        while self.message is None and not self._stop.wait(self.every):
            if any(getattr(callback, "asked", None) for callback in trainer.callbacks):
                continue  # they are about to end together
            self.message = self._missing(children, world) if children else _orphaned(parent, world)
        if self.message is not None:
            self.lost(self.message)
            if not self._stop.wait(GRACE):
                for child in children:
                    child.kill()
                os._exit(1)

    def look(self, trainer: Trainer) -> str | None:
        """What is known of a lost process now, for an error that came from the backend."""
        for _ in range(20):  # a killed process is not reaped at once
            children = list(getattr(trainer.strategy.launcher, "procs", []))
            self.message = self.message or self._missing(children, trainer.world_size)
            if self.message is not None or not children:
                break
            time.sleep(0.1)
        return self.message

    @staticmethod
    def _missing(children: list[Any], world: int) -> str | None:
        for rank, child in enumerate(children, start=1):
            if child.poll():
                return f"process {rank} of {world} {how_ended(child.returncode)}: the run ends"
        return None

    def explained(self, trainer: Trainer, error: BaseException) -> LostProcess | None:
        """An error of the backend as what it means: another process was lost. None for any other error."""
        if trainer.world_size == 1 or not isinstance(error, RuntimeError):
            return None
        message = self.look(trainer)
        if message is None and any(word in str(error) for word in LOST):
            message = f"process {trainer.global_rank} of {trainer.world_size} lost another process of this run: the run ends"
        return LostProcess(message) if message else None


def _dismiss_observer() -> None:
    # Lightning's own kills this process with SIGKILL before it can say or write anything: give it nothing to observe
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []


def _orphaned(parent: int, world: int) -> str | None:
    return f"process 0 of {world} is gone: the run ends" if os.getppid() != parent else None
