"""What a run shows and keeps beside its loss: sample grids, scores before and after, throughput, a clean stop."""

from __future__ import annotations

import netrc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlparse

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from rich.progress import track
from torch import Tensor

from tc_lightning.pixels import grid, load_png, save_png, to_uint8
from tc_lightning.prompts import fixed_seed
from tc_lightning.report import Scores

try:
    import resource
except ImportError:  # Windows
    resource = None


class SampleGrid(Callback):
    """Images of the same held-out prompts and seeds at the start, every `every` steps and at the end.

    Written to <run folder>/samples/step_<n>.png, a row a prompt, and handed to loggers that take images. The last picture,
    samples/before_after.png, shows the original beside the tuned model; samples/last/ has the tuned model's images one by one.
    Every process draws, the first one writes: a sharded
    network answers only when all ask.

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

    def texts(self, trainer: Trainer) -> list[str]:
        """The prompts that are drawn."""
        splits = trainer.datamodule.splits
        return (splits["heldout"] or splits["dev"] or splits["train"])[: self.prompts]

    def _draw(self, trainer: Trainer, module: LightningModule, tuned: bool = True) -> Tensor:
        texts = self.texts(trainer)
        rows = [(text, fixed_seed(index * self.seeds + k)) for index, text in enumerate(texts) for k in range(self.seeds)]
        images = [module.sample([text for text, _ in some], [seed for _, seed in some], tuned) for some in _chunks(rows, 8)]
        return torch.cat(images).cpu().unflatten(0, (len(texts), self.seeds))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first grid."""
        self._drawn = trainer.global_step
        images = self._save(trainer, pl_module)
        if trainer.is_global_zero and trainer.global_step == 0 and pl_module.backbone.modes["unet"] != "frozen":
            flat = images.flatten(0, 1)
            save_png(flat, self._originals(trainer), [f"{index:04d}" for index in range(len(flat))])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """A grid every so many steps."""
        if self.every and trainer.global_step % self.every == 0 and trainer.global_step > self._drawn:
            self._drawn = trainer.global_step  # a step may take several batches
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last grid, and before beside after."""
        drawn = trainer.global_step == self._drawn
        after = (self._draw if drawn else self._save)(trainer, pl_module)
        both = torch.cat([self._before(trainer, pl_module), after], dim=1)
        if not trainer.is_global_zero:
            return
        names = [f"{row}_{k}.png" for row in range(len(after)) for k in range(self.seeds)]
        save_png(after.flatten(0, 1), Path(trainer.default_root_dir) / "samples" / "last", names)
        labels = [f"{word} {k + 1}" for word in ("before", "after") for k in range(self.seeds)]
        picture = grid(both, row_labels=self.texts(trainer), column_labels=labels)
        picture.save(Path(trainer.default_root_dir) / "samples" / "before_after.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_table(logger, "table/before_after", *self._table(trainer, pl_module, both), trainer.global_step)

    def _originals(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "samples" / "original"

    def _before(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """The original model's images [P, S, 3, H, W]: drawn again, or as kept at the start where the UNet has learned."""
        kept = sorted(self._originals(trainer).glob("*.png"))
        if not kept:
            return self._draw(trainer, module, tuned=False)
        return torch.stack([load_png(file) for file in kept]).unflatten(0, (len(self.texts(trainer)), self.seeds))

    def _table(self, trainer: Trainer, module: LightningModule, both: Tensor) -> tuple[list[str], list[list]]:
        """Prompt x seed x images before and after x scores of both; `both` is [P, 2 S, 3, H, W]."""
        rows, names = [], []
        for index, (text, images) in enumerate(zip(self.texts(trainer), both, strict=True)):
            scores = module.score(images.to(module.device), [text] * len(images))
            names, values = list(scores), [column.tolist() for column in scores.values()]
            arrays = to_uint8(images)
            for k in range(self.seeds):
                pairs = [column[place] for column in values for place in (k, k + self.seeds)]
                rows.append([text, fixed_seed(index * self.seeds + k), arrays[k], arrays[k + self.seeds], *pairs])
        return ["prompt", "seed", "before", "after", *(f"{name} {word}" for name in names for word in ("before", "after"))], rows

    def _save(self, trainer: Trainer, module: LightningModule) -> Tensor:
        images = self._draw(trainer, module)
        if not trainer.is_global_zero:
            return images
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid(images, row_labels=self.texts(trainer)).save(folder / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            _log_images(logger, images.flatten(0, 1), self.texts(trainer), trainer.global_step)
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


def _log_table(logger: WandbLogger, name: str, columns: list[str], rows: list[list], step: int) -> None:
    """A table whose byte arrays [H, W, 3] are pictures."""
    import wandb

    cells = [[wandb.Image(cell) if hasattr(cell, "shape") else cell for cell in row] for row in rows]
    # a seed may exceed what a float keeps: as text it can be copied into generate seeds=
    cells = [[str(cell) if columns[place] == "seed" else cell for place, cell in enumerate(row)] for row in cells]
    logger.experiment.log({name: wandb.Table(columns=columns, data=cells), "trainer/global_step": step})


def wandb_logger(offline: bool | None = None, log_model: bool | str = False, **options: Any) -> WandbLogger:
    """Lightning's wandb logger; without a key it writes an offline run and says how to upload that.

    Args:
        offline: None is offline on a machine without a key.
        log_model: True makes checkpoints artifacts at the end, "all" during training; an offline run's go up with `wandb sync`.
        options: of WandbLogger.

    Raises:
        ValueError: wandb is not installed.
    """
    offline = not _has_wandb_key() if offline is None else offline
    if offline:
        options["mode"] = "offline"  # wandb's own: Lightning's offline=True would refuse artifacts, which can be uploaded later
    try:
        logger = WandbLogger(log_model=log_model, **options)
    except ModuleNotFoundError as error:
        raise ValueError("logger=wandb needs wandb: pip install 'tc_lightning[wandb]'; or logger=[csv]") from error
    if offline:
        place = f"{options.get('save_dir', '.')}/wandb"
        # a table's pictures wait for the upload in wandb's data folder: beside the run, not in the user's home
        if os.environ.get("WANDB_DATA_DIR", "") in ("", _DATA_DIR.get("ours")):  # of a sweep's earlier job
            os.environ["WANDB_DATA_DIR"] = _DATA_DIR["ours"] = os.path.abspath(place)
        rank_zero_info(f"wandb is offline; upload the run later with: wandb sync {place}/offline-run-*")
    return logger


_DATA_DIR: dict[str, str] = {}


def _has_wandb_key() -> bool:
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "dryrun", "disabled") or os.environ.get("WANDB_API_KEY"):
        return mode not in ("offline", "dryrun", "disabled")
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
        about = f"scoring {len(rows)} held-out prompts, {'original' if model == 'before' else 'tuned'} model"
        for some in track(_chunks(rows, self.batch_size), about, disable=not trainer.is_global_zero, transient=True):
            texts, seeds = [text for text, _ in some], [seed for _, seed in some]
            scores = module.score(module.sample(texts, seeds, tuned=model == "after"), texts)
            self.scores.add(model, texts, seeds, {name: value.tolist() for name, value in scores.items()})
        if trainer.is_global_zero and prompts:
            means = {f"{model}/{name}": self.scores.column(model, name).mean() for name in self.scores.rewards}
            if model == "after" and "before" in self.scores.models:
                gains = {name: self.scores.paired(name, "before", "after").mean for name in self.scores.rewards}
                means |= {f"gain/{name}": value for name, value in gains.items()}
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
    """Logs samples/s over the last steps (all processes together) and the peak memory in GiB: of the GPU, else of the process."""

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
        elif resource is not None:
            unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
            pl_module.log("perf/peak_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        self._since = (now, trainer.global_step)


class CleanStop(Callback):
    """Ctrl-C and SIGTERM end the run after the step in progress, with checkpoints/last.ckpt written; a second one at once.

    Of several processes it is enough that one is asked: after each batch they agree. In a SLURM job SIGUSR1 ends the run
    likewise and then has the job requeued (Lightning's own handler would save in the midst of a step).
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._old: dict[int, Any] = {}
        self._began = self._saved = -1  # global steps
        self._whole = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the signals."""
        slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
        for number in (signal.SIGINT, signal.SIGTERM, *slurm):
            self._old[number] = signal.signal(number, self._ask)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them again: Lightning's handler, set after ours, would speak to the other processes in the midst of a step."""
        if trainer.world_size > 1 and self._old:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked or not self._old:  # Lightning puts the handlers back that it found, after teardown: ours
            raise KeyboardInterrupt(name)
        self.asked = name
        if rank_zero_only.rank == 0:
            print(f"\n{name}: the run ends after this step (once more to end now)", flush=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop between two steps, when the last one's numbers are logged too.

        Also sets the step that loggers show, which Lightning counts once too often in a run taken further.
        """
        if self._saved == trainer.global_step:
            if self.asked == "SIGUSR1" and trainer.is_global_zero:
                _requeue()
            raise KeyboardInterrupt(self.asked)
        self._began = trainer.global_step
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save at the end of a whole step, so that a resumed run equals an uninterrupted one."""
        self._whole = trainer.global_step > self._began  # not amid accumulated batches, whose gradients would be lost
        self._save_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where the signal came during validation."""
        self._save_if_asked(trainer)

    def _save_if_asked(self, trainer: Trainer) -> None:
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False):
            self.asked = self.asked or "another process"
        if self.asked and self._whole and self._saved != trainer.global_step:
            self._save(trainer)
            self._saved = trainer.global_step

    @staticmethod
    def _save(trainer: Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The finished run's checkpoint, so that it can be continued with a larger max_steps."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand the signals back."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}


def _requeue() -> None:
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    rank_zero_info(f"requeued SLURM job {job}" if done.returncode == 0 else f"scontrol requeue {job}: {done.stderr.strip()}")


def checkpoints(folder: str | Path, every: int, monitor: str | None = "val/total") -> list[ModelCheckpoint]:
    """Lightning's own checkpoints: last.ckpt every `every` steps and at the end, best.ckpt by a monitored dev score."""
    options = {"dirpath": str(folder), "enable_version_counter": False, "auto_insert_metric_name": False}
    last = ModelCheckpoint(filename="last", every_n_train_steps=every, save_top_k=1, monitor=None, **options)
    return [last] + ([ModelCheckpoint(filename="best", monitor=monitor, mode="max", **options)] if monitor else [])
