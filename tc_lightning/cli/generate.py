"""Verb generate: prompts to PNGs and a grid, with one model or several side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from tc_lightning.backbone import Backbone, located
from tc_lightning.cli import build, record
from tc_lightning.model_card import record_of
from tc_lightning.pixels import grid, save_png
from tc_lightning.prompts import read_prompts
from tc_lightning.sampling import generate
from tc_lightning.tiny.model import SAMPLING

STABLE_DIFFUSION = {"steps": 25, "guidance_scale": 7.5, "timestep_spacing": "trailing"}


def run(cfg: DictConfig) -> list[Path]:
    """Write <run folder>/<model>/<prompt number>_<seed>.png and grid.png; returns the paths of the images."""
    build.quiet()
    prompts = _prompts(cfg)
    seeds = [int(seed) for seed in (cfg.seeds if isinstance(cfg.seeds, ListConfig) else [cfg.seeds])]
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size}: accepted: 1 or more")
    folder = Path(HydraConfig.get().runtime.output_dir)
    record.refuse_overwrite(folder)
    runs = [str(run) for run in cfg.run] if isinstance(cfg.run, ListConfig) else [str(cfg.run)]
    told = instantiate(cfg.rewriter)(prompts) if cfg.get("rewriter") else prompts
    paths, shown = [], []
    for number, source in enumerate(runs):
        images = _images(source, told, seeds, cfg)
        place = folder / f"{number}_{Path(source).name}" if len(runs) > 1 else folder / "images"
        names = [f"{index:04d}_{seed}" for index in range(len(prompts)) for seed in seeds]
        paths += save_png(images, place, names)
        shown.append(images.unflatten(0, (len(prompts), len(seeds))))
    labels = [f"{Path(source).name} {seed}".strip() if len(runs) > 1 else f"seed {seed}" for source in runs for seed in seeds]
    grid(torch.cat(shown, dim=1), row_labels=prompts, column_labels=labels).save(folder / "grid.png")
    card = {"verb": "generate", "run": runs, "prompts": prompts, "seeds": seeds} | ({"rewritten": told} if told != prompts else {})
    (folder / "run.json").write_text(json.dumps(card, indent=1))
    record.console.print(f"{len(paths)} images in {folder}\npicture     {folder / 'grid.png'}")
    record.console.print("next        python -m tc_lightning train --help")
    return paths


def _prompts(cfg: DictConfig) -> list[str]:
    if (cfg.text is None) == (cfg.get("prompts") is None):
        raise ValueError("""give either text='["a prompt"]' or prompts=file prompts.path=<file>""")
    if cfg.text is None:
        if "path" not in cfg.prompts:
            raise ValueError("generate reads prompts of a file: prompts=file prompts.path=<file>")
        return read_prompts(cfg.prompts.path, cfg.prompts.column, cfg.prompts.limit)
    texts = [cfg.text] if isinstance(cfg.text, str) else [str(text) for text in cfg.text]
    if not texts:
        raise ValueError("text=[] names no prompt")
    return texts


def _images(source: str, prompts: Sequence[str], seeds: Sequence[int], cfg: DictConfig) -> torch.Tensor:
    backbone = Backbone.load(source)
    trained = trained_settings(source, backbone)
    chain = {name: cfg.chain[name] if cfg.chain[name] is not None else trained[name] for name in STABLE_DIFFUSION}
    fraction = cfg.tuned_fraction if cfg.tuned_fraction is not None else trained["tuned_fraction"]
    original = backbone.original_text_encoder() if fraction < 1 else None  # it serves the steps before the tuned window
    if fraction < 1 and original is None:
        record.console.print(f"{source} comes without the text encoder before tuning: its own one serves every step", markup=False)
        fraction = 1.0
    original = original.to(_device(cfg.device)) if original is not None else None
    backbone.to(_device(cfg.device))
    return generate(backbone, prompts, seeds, tuned_fraction=fraction, original=original, batch_size=cfg.batch_size, **chain)


def trained_settings(source: str, backbone: Backbone) -> dict[str, Any]:
    """Chain and tuned fraction that a run was trained with, or that its export names; for others their usual ones."""
    usual = {**(SAMPLING if backbone.source["source"] == "tiny" else STABLE_DIFFUSION), "tuned_fraction": 1.0}
    card = record_of(located(source))
    return {**usual, **((card.get("config") or {}).get("chain") or {}), "tuned_fraction": card.get("tuned_fraction", 1.0)}


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
