"""Run folders of the embedded model as train leaves them, made in a moment: the weights are moved by seeded noise."""

import json
from pathlib import Path

import torch

from tc_lightning.backbone import Backbone, save_model

CHAIN = {"steps": 4, "guidance_scale": 4.0, "timestep_spacing": "trailing"}


def make_run(folder: Path, seed: int, tuned_fraction: float = 1.0, lora: bool = False, unet: bool = False) -> Path:
    """A finished training run; `lora` keeps adapters of the text encoder (and UNet) instead of whole weights."""
    backbone = Backbone.load("tiny")
    mode = "lora" if lora else "full"
    backbone.tune(text_encoder=mode, unet=mode if unet else "frozen", rank=2)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and (not lora or "lora_B" in name):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator) / max(1, parameter.ndim)
    for part, how in backbone.modes.items():
        if how == "full":
            save_model(getattr(backbone, part), folder / part)
        elif how == "lora":
            backbone.save_lora(part, folder / "lora" / part)
    metrics = {"before": {"total": 0.1, "tiny_clip": 0.25}, "after": {"total": 0.3, "tiny_clip": 0.5}}
    card = {
        "verb": "train",
        "status": "finished",
        "backbone": backbone.source,
        "tuned_fraction": tuned_fraction,
        "steps": 200,
        "samples": 1600,
        "metrics": metrics,
        "config": {"chain": CHAIN, "reward": {"tiny_preference": {"weight": 1.0}}, "constraint": {"constraint": {"weight": 2.0}}},
    }
    (folder / "run.json").write_text(json.dumps(card))
    return folder
