"""Verb rate: blind pairwise human evaluation of images that evaluate wrote, or that it writes now."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tc_lightning.cli import build, evaluate
from tc_lightning.cli.app import open_ratings, serve_until_stopped


def run(cfg: DictConfig) -> Path:
    """Make the images if models are named, then serve until Ctrl-C; returns the run folder."""
    build.quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (cfg.images is None) == (cfg.run is None):
        raise ValueError("give either images=<a run folder of evaluate> or run='[a,b]' with bench=")
    if cfg.images is None:
        if not (folder / "scores.csv").is_file():
            evaluate.run(cfg)
        cfg.images = str(folder)
    ratings = open_ratings(cfg, folder)  # before Gradio is asked for: a folder without images is told at once
    serve_until_stopped(cfg, folder, None, ratings)
    return folder
