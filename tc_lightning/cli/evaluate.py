"""Verb evaluate: models x bench x rewards to tables, grids and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tc_lightning.backbone import ORIGINAL, Backbone, located
from tc_lightning.cli import build, record
from tc_lightning.cli.generate import _device, trained_settings
from tc_lightning.evaluate import Evaluation, write_report
from tc_lightning.model_card import record_of
from tc_lightning.report import Scores
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.sampling import Sampler

CHAIN = ("steps", "guidance_scale", "timestep_spacing")


def run(cfg: DictConfig) -> Scores:
    """Evaluate into Hydra's output folder, or continue there; returns the scores."""
    build.quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    began = time.monotonic()
    models = _models(cfg)
    evaluation = _evaluation(cfg, folder, models)
    for load in models.values():
        load()  # a model that is not there or does not fit is told now and not after hours
    rank, world = cfg.shard if cfg.shard is not None else (0, cfg.processes)
    helpers = _start_helpers(cfg, folder) if cfg.shard is None else {}
    try:
        with _Bar() as bar:
            complete = evaluation.run(rank, world, bar)
        _wait(helpers)
        complete = complete or evaluation.run(0, 1)
    except KeyboardInterrupt:
        record.console.print(f"\ninterrupted; the same command with hydra.run.dir={folder} continues")
        raise SystemExit(130) from None
    finally:
        for process in helpers.values():
            process.kill() if process.poll() is None else None
    if cfg.shard is not None and not complete:
        record.console.print(f"part {rank} of {world} is done; the last part writes the tables in {folder}")
        return evaluation.scores()
    return _finish(evaluation, cfg, folder, time.monotonic() - began)


def _evaluation(cfg: DictConfig, folder: Path, models: dict[str, Callable[[], Sampler]]) -> Evaluation:
    bench, chosen = instantiate(cfg.bench), {}
    for group in ("reward", "watch"):
        mix = build.mix_of(cfg.get(group), group)
        chosen |= dict(mix.rewards.items()) if mix else {}
    if not chosen:
        raise ValueError("nothing to score with: reward=[...] takes one or more names, `evaluate --help` lists them")
    settings = {"chain": build.plain(cfg.chain), "tuned_fraction": cfg.tuned_fraction, "run": _sources(cfg)}
    if cfg.get("rewriter"):
        settings["rewriter"] = build.plain(cfg.rewriter)
    settings["scored_with"] = {group: build.plain(cfg[group]) for group in ("reward", "watch") if cfg.get(group)}
    rewards = RewardMix(chosen).to(_device(cfg.device))
    return Evaluation(bench, models, rewards, folder, cfg.seeds, cfg.batch_size, cfg.shown, settings)


def _sources(cfg: DictConfig) -> list[str]:
    sources = [str(source) for source in cfg.run] if isinstance(cfg.run, ListConfig) else [str(cfg.run)]
    if not sources:
        raise ValueError("run=[] names no model")
    return sources


def _models(cfg: DictConfig) -> dict[str, Callable[[], Sampler]]:
    """Name -> loader, in the order of run=."""
    sources = _sources(cfg)
    names = [Path(source).name for source in sources] if cfg.names is None else [str(name) for name in cfg.names]
    if len(names) != len(sources):
        raise ValueError(f"{len(names)} names for {len(sources)} models: names= takes one a model of run=")
    names = [name if names.index(name) == i else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
    first = next((source for source in sources if _is_run(source)), None)
    if "base" in sources and first is None:
        raise ValueError("run=base is what a run started from: name a run folder too, run='[base,<run folder>]'")
    models = {name: _loader(source, first, cfg) for name, source in zip(names, sources, strict=True)}
    rewriter = instantiate(cfg.rewriter) if cfg.get("rewriter") else None
    if rewriter is None:
        return models
    kind = HydraConfig.get().runtime.choices.get("rewriter")
    return models | {f"{name} + {kind}": _rewriting(load, rewriter) for name, load in models.items()}


def _rewriting(load: Callable[[], Sampler], rewriter: Callable[..., list[str]]) -> Callable[[], Sampler]:
    """The same model told rewritten prompts; its images are scored against the prompts as they are."""
    return lambda: replace(load(), rewriter=rewriter)


def _is_run(source: str) -> bool:
    """Whether it knows what it was tuned from: a run folder, or an export that carries the original text encoder."""
    return (located(source) / "run.json").is_file() or (located(source) / ORIGINAL).is_dir()


def _loader(source: str, first: str | None, cfg: DictConfig) -> Callable[[], Sampler]:
    def load() -> Sampler:
        device = _device(cfg.device)
        backbone = Backbone.load(first if source == "base" else source)
        settings = trained_settings(first if source == "base" else source, backbone)
        original = None
        if source == "base":
            backbone = Backbone.load(**backbone.base_record)
        elif backbone.base_record is not None:
            original = backbone.original_text_encoder().to(device)
        chain = {name: settings[name] if cfg.chain[name] is None else cfg.chain[name] for name in CHAIN}
        fraction = settings["tuned_fraction"] if cfg.tuned_fraction is None else cfg.tuned_fraction
        fraction = fraction if original is not None else 1.0
        return Sampler(backbone.to(device), **chain, tuned_fraction=fraction, original=original, scheduler=cfg.chain.scheduler)

    return load


def _start_helpers(cfg: DictConfig, folder: Path) -> dict[Path, subprocess.Popen]:
    """Further processes of this evaluation, each with its log file."""
    import torch

    helpers = {}
    threads = max(1, torch.get_num_threads() // max(1, cfg.processes))
    for rank in range(1, cfg.processes):
        overrides = [word for word in HydraConfig.get().overrides.task if not word.startswith(("processes=", "shard="))]
        overrides += [f"shard=[{rank},{cfg.processes}]", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        if torch.cuda.device_count() > 1 and cfg.device == "auto":
            overrides.append(f"device=cuda:{rank % torch.cuda.device_count()}")
        log = folder / f"process_{rank}.log"
        command = [sys.executable, "-m", "tc_lightning", "evaluate", *overrides]
        with log.open("w", encoding="utf-8") as out:
            environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
            helpers[log] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
            )
    return helpers


def _wait(helpers: dict[Path, subprocess.Popen]) -> None:
    for log, process in helpers.items():
        if process.wait():
            last = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
            raise ValueError(f"a process of the evaluation ended with {process.returncode}, see {log}: " + " ".join(last))


def _finish(evaluation: Evaluation, cfg: DictConfig, folder: Path, seconds: float) -> Scores:
    scores = write_report(evaluation, _trained_on(cfg, list(evaluation.models)))
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


def _trained_on(cfg: DictConfig, names: list[str]) -> dict[str, list[str]]:
    """What each run's record says it was trained on, the constraint included."""
    found = {}
    sources = _sources(cfg)
    for name, source in zip(names, sources * (len(names) // len(sources)), strict=True):
        if not _is_run(source):
            continue
        config = record_of(located(source)).get("config", {})
        held = (config.get("constraint") or {}).get("constraint") or {}
        constraint = [held["_target_"].rsplit(".", 1)[-1]] if "_target_" in held else []
        found[name] = [*(config.get("reward") or {}), *constraint]
    return found


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
