"""What a run shows and keeps beside its loss: sample grids, scores before and after, throughput, a clean stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from tc_lightning.pixels import grid, to_uint8
from tc_lightning.prompts import fixed_seed
from tc_lightning.report import Scores


class SampleGrid(Callback):
    """Images of the same held-out prompts and seeds at the start, every `every` steps and at the end.

    Written to <run folder>/samples/step_<n>.png, a row a prompt, and handed to loggers that take images. The last picture,
    samples/before_after.png, shows the original beside the tuned model.

    Args:
        prompts: how many of the held-out prompts; of the dev or training prompts where there are none.
        seeds: images a prompt.
        every: steps between grids; 0 draws only the first and the last.
    """

    def __init__(self, prompts: int = 6, seeds: int = 4, every: int = 0) -> None:
        if prompts < 1 or seeds < 1 or every < 0:
            raise ValueError(f"SampleGrid(prompts={prompts}, seeds={seeds}, every={every}): at least 1, 1 and 0")
        self.prompts, self.seeds, self.every = prompts, seeds, every
        self._drawn = 0

    def _texts(self, trainer: Trainer) -> list[str]:
        splits = trainer.datamodule.splits
        return (splits["heldout"] or splits["dev"] or splits["train"])[: self.prompts]

    def _draw(self, trainer: Trainer, module: LightningModule, tuned: bool = True) -> Tensor:
        texts = self._texts(trainer)
        rows = [(text, fixed_seed(index * self.seeds + k)) for index, text in enumerate(texts) for k in range(self.seeds)]
        images = [module.sample([text for text, _ in some], [seed for _, seed in some], tuned) for some in _chunks(rows, 8)]
        return torch.cat(images).cpu().unflatten(0, (len(texts), self.seeds))

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first grid."""
        self._drawn = trainer.global_step
        self._save(trainer, pl_module)

    @rank_zero_only
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """A grid every so many steps."""
        if self.every and trainer.global_step % self.every == 0 and trainer.global_step > self._drawn:
            self._drawn = trainer.global_step  # a step may take several batches
            self._save(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last grid, and before beside after."""
        after = self._save(trainer, pl_module)
        both = torch.cat([self._draw(trainer, pl_module, tuned=False), after], dim=1)
        labels = [f"{word} {k + 1}" for word in ("before", "after") for k in range(self.seeds)]
        picture = grid(both, row_labels=self._texts(trainer), column_labels=labels)
        picture.save(Path(trainer.default_root_dir) / "samples" / "before_after.png")

    def _save(self, trainer: Trainer, module: LightningModule) -> Tensor:
        images = self._draw(trainer, module)
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid(images, row_labels=self._texts(trainer)).save(folder / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            _log_images(logger, images.flatten(0, 1), self._texts(trainer), trainer.global_step)
        return images


def _log_images(logger: Any, images: Tensor, captions: Sequence[str], step: int) -> None:
    arrays = list(to_uint8(images))
    if hasattr(logger, "log_image"):  # wandb
        each = len(arrays) // len(captions)
        texts = [captions[index // each] for index in range(len(arrays))]
        logger.log_image("samples", arrays, step=step, caption=texts)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):  # tensorboard
        for index, array in enumerate(arrays):
            logger.experiment.add_image(f"samples/{index}", array, step, dataformats="HWC")


def _chunks(rows: Sequence, size: int) -> list[Sequence]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class BeforeAfter(Callback):
    """Scores held-out prompts with fixed seeds before the first step and after the last; survives a resume.

    Args:
        batch_size: images a batch; it does not change the scores.
        limit: at most so many of the held-out prompts, all by default.
    """

    def __init__(self, batch_size: int = 32, limit: int | None = None) -> None:
        self.batch_size, self.limit = batch_size, limit
        self.scores = Scores()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The original model's scores, unless a checkpoint brought them."""
        if not self.scores.rows:
            self._measure(trainer, pl_module, "before")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The tuned model's scores."""
        self._measure(trainer, pl_module, "after")

    def _measure(self, trainer: Trainer, module: LightningModule, model: str) -> None:
        prompts = trainer.datamodule.splits["heldout"][: self.limit]
        rows = [(prompt, fixed_seed(1_000_000 + index)) for index, prompt in enumerate(prompts)]
        for some in _chunks(rows, self.batch_size):
            texts, seeds = [text for text, _ in some], [seed for _, seed in some]
            scores = module.score(module.sample(texts, seeds, tuned=model == "after"), texts)
            self.scores.add(model, texts, seeds, {name: value.tolist() for name, value in scores.items()})
        if trainer.is_global_zero and prompts:
            means = {f"{model}/{name}": self.scores.column(model, name).mean() for name in self.scores.rewards}
            for logger in trainer.loggers:
                logger.log_metrics(means, trainer.global_step)

    def metrics(self) -> dict[str, dict[str, float]]:
        """{"before": {name: mean}, "after": {...}}, as far as measured."""
        return {model: {n: float(self.scores.column(model, n).mean()) for n in self.scores.rewards} for model in self.scores.models}

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"rows": self.scores.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The scores before the first step."""
        self.scores = Scores([row for row in state_dict["rows"] if row["model"] == "before"])


class Throughput(Callback):
    """Logs samples/s over the last steps (all processes together) and, on a GPU, the peak memory in GiB."""

    def __init__(self, every: int = 10) -> None:
        self.every = max(1, every)
        self._since = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the rate of the last steps."""
        began, step = self._since
        if trainer.global_step - step < self.every:
            return
        now = time.monotonic()
        samples = (
            (trainer.global_step - step) * trainer.accumulate_grad_batches * trainer.datamodule.batch_size * trainer.world_size
        )
        pl_module.log("perf/samples_per_second", samples / (now - began), prog_bar=True)
        if pl_module.device.type == "cuda":
            pl_module.log("perf/peak_gib", torch.cuda.max_memory_allocated() / 2**30)
        self._since = (now, trainer.global_step)


class CleanStop(Callback):
    """Ctrl-C and SIGTERM end the run after the step in progress, with checkpoints/last.ckpt written; a second one at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._old: dict[int, Any] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked:
            raise KeyboardInterrupt(name)
        self.asked = name
        print(f"\n{name}: the run ends after this step (once more to end now)", flush=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Where this batch begins."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save and stop at the end of a whole step, so that a resumed run equals an uninterrupted one."""
        if self.asked and trainer.global_step > self._step:  # not amid accumulated batches, whose gradients would be lost
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            raise KeyboardInterrupt(self.asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The finished run's checkpoint, so that it can be continued with a larger max_steps."""
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand the signals back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


def checkpoints(folder: str | Path, every: int, monitor: str | None = "val/total") -> list[ModelCheckpoint]:
    """Lightning's own checkpoints: last.ckpt every `every` steps and at the end, best.ckpt by a monitored dev score."""
    options = {"dirpath": str(folder), "enable_version_counter": False, "auto_insert_metric_name": False}
    last = ModelCheckpoint(filename="last", every_n_train_steps=every, save_top_k=1, monitor=None, **options)
    return [last] + ([ModelCheckpoint(filename="best", monitor=monitor, mode="max", **options)] if monitor else [])
