"""Verb pretrain: the embedded model again from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from tc_lightning.cli import build, record
from tc_lightning.pretrain import Workshop, missed, pretrain


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run or continue the stages in `folder`; returns the quality figures."""
    build.quiet()
    if cfg.effort <= 0:
        raise ValueError(f"effort={cfg.effort}: accepted: above 0 (1 makes the shipped model)")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    folder = Path(cfg.folder)
    quality = pretrain(Workshop(folder, cfg.seed, cfg.effort, say=lambda line: print(line, flush=True)))
    rows = {stage: ", ".join(f"{name} {value}" for name, value in figures.items()) for stage, figures in quality.items()}
    record.table("quality of the saved files", rows)
    for line in missed(quality):
        record.console.print(line)
    record.console.print(f"\nmodel folder  {folder}")
    record.console.print(f"next          python -m tc_lightning train backbone.source={folder}")
    return quality
