"""One stage of pre-training: a loop that can be killed at any step and continues where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

SAVE_EVERY = 60.0  # seconds


@dataclass
class Workshop:
    """Where pre-training works and how much: `effort` scales every stage's number of steps."""

    folder: Path
    seed: int = 0
    effort: float = 1.0
    say: Callable[[str], None] = print
    quality: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        if (self.folder / "quality.json").exists():
            self.quality = json.loads((self.folder / "quality.json").read_text())

    def steps(self, steps: int) -> int:
        """`steps` scaled by the effort, at least 1."""
        return max(1, round(steps * self.effort))

    def done(self, stage: str) -> bool:
        """Whether a stage has been finished and measured."""
        return stage in self.quality

    def finish(self, stage: str, **figures: float) -> None:
        """Record a finished stage with its quality figures."""
        self._read()
        self.quality[stage] = {name: round(float(value), 4) for name, value in figures.items()}
        (self.folder / "quality.json").write_text(json.dumps(self.quality, indent=1) + "\n")
        self.say(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in self.quality[stage].items()))


def fit(
    shop: Workshop,
    stage: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    ema_decay: float | None = None,
) -> nn.Module:
    """Minimise `loss(step)` over the parameters of `model` with AdamW, warm-up and cosine decay; returns the model.

    The loss must draw its data from (seed, step) alone: then a resumed run equals an uninterrupted one. With
    `ema_decay` the model returned holds the running average of its weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    average = {name: value.detach().clone() for name, value in model.named_parameters()} if ema_decay else {}
    path = shop.folder / f"{stage}.pt"
    start = _resume(path, model, optimizer, average)
    saved = began = time.monotonic()
    model.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema_decay or 0.0, (step + 1) / (step + 10))
        for name, parameter in model.named_parameters() if average else ():
            average[name].lerp_(parameter.detach(), 1 - decay)
        if step % 50 == 0:
            shop.say(f"{stage} {step}/{steps} loss {value.item():.4f} {time.monotonic() - began:.0f} s")
        if time.monotonic() - saved > SAVE_EVERY or step == steps - 1:
            _save(path, model, optimizer, average, step + 1)
            saved = time.monotonic()
    with torch.no_grad():
        for name, parameter in model.named_parameters() if average else ():
            parameter.copy_(average[name])
    return model.eval()


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.update(state["average"])
    return state["step"]


def half(model: nn.Module, folder: Path) -> None:
    """Save the model in fp16, in the key layout that transformers 4 and 5 and diffusers of both eras read."""
    from tc_lightning.backbone import save_model

    save_model(model, folder, dtype=torch.float16)
