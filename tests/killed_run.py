"""A training run for tests that kill it: it logs every batch, and may write its checkpoints slowly.

python killed_run.py <log file> <seconds a checkpoint's write takes> <arguments of the command>
"""

import json
import os
import sys
import time
from pathlib import Path

from pytorch_lightning import Callback


class BatchLog(Callback):
    """A line a batch: [number of the step that it belongs to, prompts, seeds]; on the disk before the step begins."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.global_step, batch["prompts"], batch["seeds"]]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def slow_writes(seconds: float) -> None:
    """Every checkpoint's write stops half-way for so long, with <name>.ckpt.part begun and no file whole but the old ones."""
    from tc_lightning import checkpoint_io

    class Slow(checkpoint_io._Hashing):
        written = 0

        def write(self, data):
            done = super().write(data)
            before, self.written = self.written, self.written + len(data)
            if before < 1_000_000 <= self.written:
                self.file.flush()
                time.sleep(seconds)
            return done

    checkpoint_io._Hashing = Slow


if __name__ == "__main__":
    log, seconds, *arguments = sys.argv[1:]
    if float(seconds):
        slow_writes(float(seconds))
    from tc_lightning.cli import main

    sys.argv = ["tc_lightning", *arguments, "+callbacks.log._target_=killed_run.BatchLog", f"+callbacks.log.path={log}"]
    main()
