"""Verb prefix: the steps before the gradient of a training run, computed ahead of it and kept."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tc_lightning.cli import build, record
from tc_lightning.module import TextCraftor
from tc_lightning.prompts import PromptData

EVERY = 10.0  # seconds between lines where there is no terminal


def run(cfg: DictConfig) -> dict[str, Any]:
    """Fill the cache with what a training run of the same settings meets; returns the run's record."""
    build.quiet()
    build.check_numbers(cfg)
    if cfg.cache.dir is None:
        raise ValueError("cache.dir must be given: cache.dir=<folder>")
    folder = Path(HydraConfig.get().runtime.output_dir)
    record.refuse_overwrite(folder)
    backbone = build.build_backbone(cfg)
    data = build.build_data(cfg, backbone)
    module = build.build_method(cfg, backbone)
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False, default_root_dir=str(folder))
    module.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():  # what a record is worth depends on the precision it is made in
        module.lower_frozen(trainer.precision)
        module.open_prefix()
        card = _fill(cfg, module, data, trainer)
    record.write_record(folder, {"verb": "prefix", "git": record.git_commit(), "versions": record.versions(), **card})
    _say(folder, card)
    return card


def _fill(cfg: DictConfig, module: TextCraftor, data: PromptData, trainer: Trainer) -> dict[str, Any]:
    total = cfg.max_steps * trainer.accumulate_grad_batches
    wanted = min(total * data.batch_size * trainer.world_size, len(data.splits["train"]) * data.seeds_per_prompt)
    _announce(cfg, module, wanted)
    cache, began, status = module.prefix, time.monotonic(), "finished"
    try:
        with _Bar(wanted, len(cache.store)) as bar:
            for number, batch in _missing(module, data, trainer.world_size, total):
                with cache.store.claim(number) as mine:
                    if mine:
                        cache.store.refresh()
                        cache.latents(batch["prompts"], batch["seeds"], module.run_prefix)
                bar(len(cache.store), cache.misses)
                if cache.store.full:
                    status = "full"
                    break
    except KeyboardInterrupt:
        status = "interrupted"
    cache.store.refresh()
    made = cache.misses
    card = {"status": status, "seconds": round(time.monotonic() - began, 1), "samples": made, "records": len(cache.store)}
    return {**card, "folder": str(cache.store.folder), "overrides": list(HydraConfig.get().overrides.task)}


def _missing(module: TextCraftor, data: PromptData, world: int, total: int) -> Iterator[tuple[int, dict[str, list]]]:
    """Batches as training meets them, with their numbers, as far as one of their records is not kept yet."""
    streams = [data.batches(rank, world, total) for rank in range(world)]
    for step, shares in enumerate(zip(*streams, strict=True)):
        for rank, batch in enumerate(shares):
            if not all(module.prefix.has(*row) for row in zip(batch["prompts"], batch["seeds"], strict=True)):
                yield step * world + rank, batch


def _announce(cfg: DictConfig, module: TextCraftor, wanted: int) -> None:
    """The size, before anything is computed.

    Raises:
        ValueError: the disk does not hold it.
    """
    store = module.prefix.store
    store.refresh()
    size, free = wanted * store.record_bytes, shutil.disk_usage(store.folder).free
    kept = len(store)
    record.table(
        "prefix",
        {
            "steps": f"{module.first_gradient_step} of {len(module.chain)}, the same in every epoch and in runs that share them",
            "records": f"{wanted:,} x {store.record_bytes:,} B = {_human(size)} ({cfg.cache.dtype}), {kept:,} kept already",
            "limit": "none" if cfg.cache.max_gb is None else f"{cfg.cache.max_gb:g} GB (cache.max_gb)",
            "disk": f"{_human(free)} free",
            "folder": str(store.folder),
        },
    )
    left = size - kept * store.record_bytes
    if left > free and (cfg.cache.max_gb is None or cfg.cache.max_gb * 1e9 > free):
        raise ValueError(
            f"{_human(left)} of records do not fit into the {_human(free)} that are free in {store.folder}: fewer max_steps, "
            "prompts.seeds_per_prompt=1, cache.dtype=float16, a cache.max_gb, or another cache.dir"
        )


def _human(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _say(folder: Path, card: dict[str, Any]) -> None:
    words = [word for word in card["overrides"] if not word.startswith("hydra.")]
    record.console.print(f"\n{card['status']}: {card['samples']:,} computed in {card['seconds']:.0f} s, {card['records']:,} kept")
    record.console.print(f"run folder  {folder}\nrecords     {card['folder']}", markup=False)
    verb = "train" if card["status"] != "interrupted" else "prefix"
    record.console.print(f"next        python -m tc_lightning {verb} {shlex.join(words)}", markup=False)


class _Bar:
    """Samples, samples/s and the time that is left: a bar on a terminal, else a line every few seconds."""

    def __init__(self, wanted: int, kept: int) -> None:
        columns = (
            TextColumn("prefix"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=record.console)
        self.task = self.progress.add_task("prefix", total=wanted, completed=kept, rate="")
        self.wanted, self.began, self.told = wanted, time.monotonic(), time.monotonic()

    def __enter__(self) -> _Bar:
        if record.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if record.console.is_terminal:
            self.progress.stop()

    def __call__(self, kept: int, made: int) -> None:
        """`kept` records are there, `made` of them by this process."""
        now = time.monotonic()
        rate = made / max(now - self.began, 1e-9)
        self.progress.update(self.task, completed=kept, rate=f"{rate:.3g} samples/s")
        if not record.console.is_terminal and now - self.told > EVERY:
            self.told = now
            left = f", {(self.wanted - kept) / rate:.0f} s left" if rate else ""
            record.console.print(f"prefix: {kept:,}/{self.wanted:,}, {rate:.3g} samples/s{left}")
