"""Verb export: a tuned model in the forms that other tools load."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tc_lightning.cli import build, record
from tc_lightning.cli.generate import _device
from tc_lightning.export import Exported, Source, export, upload
from tc_lightning.model_card import in_comfyui


def run(cfg: DictConfig) -> Exported:
    """Write, read back, compare; with repo= ask and upload. Returns what was written."""
    build.quiet()
    source = Source.load(str(cfg.run))
    if cfg.base is not None:
        source.base = str(cfg.base)
    device = _device(cfg.device)
    source.backbone.to(device), source.original.to(device)
    options = {"lora_rank": cfg.lora_rank, "prompt": cfg.check.text, "steps": cfg.check.steps, "name": cfg.name}
    made = export(source, _out(cfg), cfg.to, cfg.dtype, cfg.part, **options)
    fraction = source.run.get("tuned_fraction", 1.0)
    record.table(f"exported to {made.path}", _rows(cfg, made, fraction))
    if fraction < 1:
        record.console.print(f"In ComfyUI: {in_comfyui({'tuned_fraction': fraction})}", markup=False)
    if cfg.repo is not None:
        _upload(cfg, made.path)
    elif cfg.to == "hub":
        record.console.print(f"next        python -m tc_lightning export run={cfg.run} to=hub out={made.path} repo=<user>/<name>")
    else:
        record.console.print(f"""next        {_next(cfg, made.path)}""", markup=False)
    return made


def _out(cfg: DictConfig) -> Path:
    if cfg.out is not None:
        return Path(cfg.out)
    name = cfg.name or Path(str(cfg.run)).name
    return Path(HydraConfig.get().runtime.output_dir) / (f"{name}.safetensors" if cfg.to == "single_file" else name)


def _rows(cfg: DictConfig, made: Exported, fraction: float) -> dict[str, str]:
    written = [made.path] if made.path.is_file() else [made.path / name for name in made.files]
    return {
        "files": ", ".join(made.files[:8]) + (f" and {len(made.files) - 8} more" if len(made.files) > 8 else ""),
        "bytes": f"{sum(file.stat().st_size for file in written):,}",
        "read back": "the same image" if cfg.to != "lora" else "both layouts give the merged weights' image",
        f"{cfg.dtype} against fp32": f"{made.rounding:.2g} largest pixel difference in [0, 1]",
        "tuned_fraction": f"{fraction:g}",
    }


def _next(cfg: DictConfig, path: Path) -> str:
    if cfg.to == "diffusers" and cfg.part == "pipeline":
        return f"""python -m tc_lightning generate run={path} text='["a red circle on the left"]'"""
    if cfg.to == "single_file":
        return "ComfyUI: models/checkpoints (whole), models/clip (clip_l); A1111: models/Stable-diffusion (whole)"
    return "A1111 and ComfyUI: models/loras, kohya.safetensors" if cfg.to == "lora" else f"backbone.text_encoder={path}"


def _upload(cfg: DictConfig, folder: Path) -> None:
    if cfg.to != "hub":
        raise ValueError(f"repo={cfg.repo} needs to=hub")
    if not upload(folder, cfg.repo, _ask if not cfg.yes else lambda question: True, cfg.private):
        record.console.print(f"not uploaded; the folder is {folder}; later: hf upload {cfg.repo} {folder}")


def _ask(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
