"""Verb evaluate: models x bench x rewards to tables, grids and plots."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tc_lightning.cli import build, record
from tc_lightning.cli.generate import _device
from tc_lightning.cli.models import Entry, entries, loaders, trained_on
from tc_lightning.cli.tables import take_rows
from tc_lightning.evaluate import Evaluation, write_report
from tc_lightning.report import Scores
from tc_lightning.rewards.mix import RewardMix

NOT_FOR_HELPERS = ("processes=", "shard=", "train=", "images=", "rater=", "limit=", "port=", "browser=")


def run(cfg: DictConfig) -> Scores:
    """Evaluate into Hydra's output folder, or continue there; returns the scores."""
    build.quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    began = time.monotonic()
    if cfg.get("table"):
        take_rows(cfg)
    found = entries(cfg)
    evaluation = _evaluation(cfg, folder, found)
    for load in evaluation.models.values():
        load()  # a model that is not there or does not fit is told now and not after hours
    rank, world = cfg.shard if cfg.shard is not None else (0, _processes(cfg))
    helpers: dict[Path, subprocess.Popen] = {}
    try:
        helpers |= _start_helpers(cfg, folder, world) if cfg.shard is None else {}
        with _Bar() as bar:
            complete = evaluation.run(rank, world, bar)
        _wait(helpers)
        complete = complete or evaluation.run(0, 1)
    except KeyboardInterrupt:
        given = [word for word in sys.argv[2:] if not word.startswith("hydra.run.dir=")]
        command = shlex.join(["python", "-m", "tc_lightning", "evaluate", *given, f"hydra.run.dir={folder}"])
        record.console.print(f"\ninterrupted; what is scored is kept\ncontinue    {command}", markup=False)
        raise SystemExit(130) from None
    finally:
        for process in helpers.values():
            process.kill() if process.poll() is None else None
    if cfg.shard is not None and not (complete and cfg.report):
        record.console.print(f"part {rank} of {world} is done; the last part writes the tables in {folder}")
        return evaluation.scores()
    return _finish(evaluation, cfg, folder, trained_on(found), time.monotonic() - began)


def _evaluation(cfg: DictConfig, folder: Path, found: list[Entry]) -> Evaluation:
    bench, chosen = instantiate(cfg.bench), {}
    for group in ("reward", "watch"):
        mix = build.mix_of(cfg.get(group), group)
        chosen |= dict(mix.rewards.items()) if mix else {}
    if not chosen:
        raise ValueError("nothing to score with: reward=[...] takes one or more names, `evaluate --help` lists them")
    named = [entry.plain() for entry in found if not entry.rewritten]
    settings = {"chain": build.plain(cfg.chain), "tuned_fraction": cfg.tuned_fraction, "run": named}
    if cfg.get("rewriter"):
        settings["rewriter"] = build.plain(cfg.rewriter)
    settings["scored_with"] = {group: build.plain(cfg[group]) for group in ("reward", "watch") if cfg.get(group)}
    rewards = RewardMix(chosen).to(_device(cfg.device))
    numbers = {name: cfg[name] for name in ("seeds", "batch_size", "micro_batch", "shown")}
    return Evaluation(bench, loaders(found, cfg), rewards, folder, **numbers, settings=settings)


def _processes(cfg: DictConfig) -> int:
    """Asked for, or one a GPU, or two on a CPU with two cores or more: each works with one thread there."""
    import torch

    if cfg.processes is not None:
        return cfg.processes
    if _device(cfg.device) == "cpu":
        return min(2, os.cpu_count() or 1)
    return max(1, torch.cuda.device_count()) if cfg.device == "auto" else 1


def _start_helpers(cfg: DictConfig, folder: Path, world: int) -> dict[Path, subprocess.Popen]:
    """Further processes of this evaluation, each with its log file."""
    import torch

    helpers = {}
    for rank in range(1, world):
        # rate evaluates too: its other defaults are said, its own keys left out
        overrides = [f"seeds={cfg.seeds}", f"shown={cfg.shown}"]
        overrides += [word for word in HydraConfig.get().overrides.task if not word.startswith(NOT_FOR_HELPERS)]
        overrides += [f"shard=[{rank},{world}]", f"hydra.run.dir={folder}", "hydra.output_subdir=null", "report=false"]
        if torch.cuda.device_count() > 1 and cfg.device == "auto":
            overrides.append(f"device=cuda:{rank % torch.cuda.device_count()}")
        log = folder / f"process_{rank}.log"
        command = [sys.executable, "-m", "tc_lightning", "evaluate", *overrides]
        with log.open("w", encoding="utf-8") as out:
            helpers[log] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    return helpers


def _wait(helpers: dict[Path, subprocess.Popen]) -> None:
    for log, process in helpers.items():
        if process.wait():
            last = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise ValueError(f"a process of the evaluation ended with {process.returncode}, see {log}: " + " ".join(last))


def _finish(evaluation: Evaluation, cfg: DictConfig, folder: Path, trained: dict[str, list[str]], seconds: float) -> Scores:
    scores = write_report(evaluation, trained)
    card = {"verb": "evaluate", "status": "finished", "seconds": round(seconds, 1), "git": record.git_commit()}
    card |= {"versions": record.versions(), "overrides": list(HydraConfig.get().overrides.task), "config": build.plain(cfg)}
    record.write_record(folder, card | {"metrics": json.loads((folder / "scores.json").read_text(encoding="utf-8"))["models"]})
    table = record.Table(
        "score", *scores.models, title=f"{evaluation.bench.name}: {len(evaluation.bench)} prompts x {cfg.seeds} seeds"
    )
    prompts = scores.over_seeds()
    for name in scores.rewards:
        table.add_row(name, *(str(prompts.mean(model, name)) for model in scores.models))
    record.console.print(table)
    record.console.print(
        f"\nrun folder  {folder}\ntables      {folder / 'scores.md'}\npictures    {folder / 'grids'}, {folder / 'plots'}"
    )
    record.console.print("next        python -m tc_lightning evaluate --help")
    return scores


class _Bar:
    """Progress with the time that is left: a bar on a terminal, else a line every tenth."""

    def __enter__(self) -> _Bar:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=record.console)
        self.tasks: dict[str, Any] = {}
        self.told: dict[str, int] = {}
        if record.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if record.console.is_terminal:
            self.progress.stop()

    def __call__(self, model: str, done: int, of: int, left: float) -> None:
        if record.console.is_terminal:
            if model not in self.tasks:
                self.tasks[model] = self.progress.add_task(model, total=of)
            self.progress.update(self.tasks[model], completed=done)
        elif done * 10 // of > self.told.get(model, -1):
            self.told[model] = done * 10 // of
            record.console.print(f"{model}: {done}/{of} images, {left:.0f} s left")
