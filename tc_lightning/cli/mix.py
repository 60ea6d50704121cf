"""Verb mix: interpolation and style mixing of tuned text encoders, as a strip of pictures or as one saved encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig
from torch import nn

from tc_lightning.backbone import Backbone, located
from tc_lightning.cli import build, record
from tc_lightning.cli.generate import STABLE_DIFFUSION, _device, _prompts, trained_settings
from tc_lightning.mixing import PRESETS, Mixture, mix, save_mixture, strip
from tc_lightning.pixels import save_png


def run(cfg: DictConfig) -> list[Path]:
    """Write <run folder>/<mixture number>/<prompt number>_<seed>.png and strip.png; returns the paths of the images."""
    build.quiet()
    prompts, folder = _prompts(cfg), Path(HydraConfig.get().runtime.output_dir)
    runs = [str(run) for run in cfg.run] if isinstance(cfg.run, ListConfig) else [str(cfg.run)]
    names = _names(cfg, runs)
    mixtures = [Mixture.of(weights, names, cfg.normalize) for weights in _weight_sets(cfg, len(runs))]
    _check_save(cfg, mixtures)
    base, tuned, settings = load_tuned(runs, names, cfg.base, _device(cfg.device))
    settings |= {name: cfg.chain[name] for name in STABLE_DIFFUSION if cfg.chain[name] is not None}
    settings |= {"tuned_fraction": cfg.tuned_fraction} if cfg.tuned_fraction is not None else {}
    sampling = {name: settings[name] for name in (*STABLE_DIFFUSION, "tuned_fraction")}
    seeds = [int(seed) for seed in (cfg.seeds if isinstance(cfg.seeds, ListConfig) else [cfg.seeds])]
    options = {"seeds": seeds, "space": cfg.space, "batch_size": cfg.batch_size, "scheduler": cfg.chain.scheduler, **sampling}
    images = torch.stack([mix(base, tuned, prompts, mixture.weights, **options) for mixture in mixtures])
    files = [f"{index:04d}_{seed}" for index in range(len(prompts)) for seed in seeds]
    paths = [path for number, made in enumerate(images) for path in save_png(made, folder / f"{number:02d}", files)]
    labels = [f"{prompt} (seed {seed})" if len(seeds) > 1 else prompt for prompt in prompts for seed in seeds]
    strip(images, mixtures, labels).save(folder / "strip.png")
    card = _card(cfg, runs, prompts, seeds, mixtures, sampling)
    record.write_record(folder, card)
    record.console.print(f"{len(paths)} images of {len(mixtures)} mixtures in {folder}\npicture     {folder / 'strip.png'}")
    if cfg.save is not None:
        folder = save_mixture(cfg.save, base, tuned, mixtures[0], card)
        record.console.print(f"encoder     {folder} ({mixtures[0].label})")
        record.console.print(f"next        python -m tc_lightning export run={folder} to=single_file out=mixed.safetensors")
    else:
        record.console.print(
            "next        the same with space=weights weights='[...]' save=<folder>: one text encoder", markup=False
        )
    return paths


def _names(cfg: DictConfig, runs: list[str]) -> list[str]:
    names = [str(name) for name in cfg.names] if cfg.names is not None else [located(run).stem for run in runs]
    if len(names) != len(runs):
        raise ValueError(f"{len(names)} names for {len(runs)} text encoders: names= takes one each of run=")
    return [name if names.count(name) == 1 else f"{name}_{index + 1}" for index, name in enumerate(names)]


def _weight_sets(cfg: DictConfig, count: int) -> list[list[float]]:
    if cfg.weights is None:
        preset = cfg.preset or ("figure_4" if count == 1 else "figure_5")
        if preset not in PRESETS:
            raise ValueError(f"preset={preset}, accepted: {', '.join(PRESETS)}")
        return PRESETS[preset](count)
    if cfg.preset is not None:
        raise ValueError("weights= and preset= are both given: give one of them")
    given = build.plain(cfg)["weights"]
    sets = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    if not all(isinstance(weights, list) and all(isinstance(w, int | float) for w in weights) for weights in sets):
        raise ValueError(f"weights={given}: accepted is a list of numbers, or a list of such lists")
    return sets


def _check_save(cfg: DictConfig, mixtures: list[Mixture]) -> None:
    if cfg.save is None:
        return
    if cfg.space != "weights":
        raise ValueError("save= needs space=weights: in embedding space the mixture is no single text encoder")
    if len(mixtures) != 1:
        raise ValueError(f"save= needs one set of weights, not {len(mixtures)}: weights='[...]'")
    record.refuse_overwrite(Path(cfg.save))


def load_tuned(
    runs: list[str], names: list[str], base: str | None, device: str
) -> tuple[Backbone, dict[str, nn.Module], dict[str, Any]]:
    """The original model, the tuned text encoders by name, and the chain that the first of them was trained with.

    Raises:
        ValueError: a run that is not there, does not fit, or tuned its UNet too (which a mixture of texts would drop).
    """
    original = Backbone.load(base) if base else None
    tuned, settings = {}, None
    for run, name in zip(runs, names, strict=True):
        folder = located(run)
        if (folder / "unet").is_dir() and (folder / "run.json").is_file() or (folder / "lora" / "unet").is_dir():
            raise ValueError(f"{run} tuned its UNet too, and a mixture is of text encoders: name its folder {run}/text_encoder")
        if original is None:
            record_of_base = Backbone.load(run).base_record
            if record_of_base is None:
                raise ValueError(f"{run} does not say which model it was tuned from: base=<that model>")
            original = Backbone.load(**record_of_base)
        settings = settings or trained_settings(run, original)
        original_encoder = original.text_encoder
        original.replace("text_encoder", run)
        tuned[name], original.text_encoder = original.text_encoder.to(device), original_encoder
    if original is None or settings is None:
        raise ValueError("run=[] names no text encoder to mix")
    return original.to(device), tuned, settings


def _card(cfg: DictConfig, runs: list[str], prompts: list[str], seeds: list[int], mixtures: list[Mixture], sampling: dict) -> dict:
    return {
        "verb": "mix",
        "status": "finished",
        "run": runs,
        "prompts": prompts,
        "seeds": seeds,
        "space": cfg.space,
        "mixtures": [dict(zip(mixture.names, mixture.weights, strict=True)) for mixture in mixtures],
        "tuned_fraction": sampling["tuned_fraction"],
        "config": {"chain": {name: sampling[name] for name in STABLE_DIFFUSION}},
        "git": record.git_commit(),
        "versions": record.versions(),
    }
