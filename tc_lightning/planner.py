"""What a run will cost, from one measured step: UNet calls, FLOPs, memory, time. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch.utils.flop_counter import FlopCounterMode

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass(frozen=True)
class Plan:
    """A measured step, of `batch` samples, and what follows from it for `steps` of them in `world` processes.

    `unet_calls`, `unet_gradient` and `recomputed` count calls of the UNet in a step: all, those with gradient, and those of these
    that backward makes a second time. `prefix_seconds` is what the steps before the gradient take, 0 where they are not kept.
    """

    batch: int
    steps: int
    world: int
    seconds: float
    flops: float
    peak_bytes: int
    unet_calls: int
    unet_gradient: int
    recomputed: int
    prefix_calls: int
    prefix_seconds: float
    first_epochs_steps: int

    @property
    def samples(self) -> int:
        """Of the whole run."""
        return self.batch * self.steps * self.world

    @property
    def total_seconds(self) -> float:
        """Of all training steps; where prefixes are kept, only the first meeting with a record pays for it."""
        cold = min(self.steps, self.first_epochs_steps)
        return self.seconds * self.steps - self.prefix_seconds * (self.steps - cold)

    def rows(self) -> dict[str, str]:
        """For a table."""
        kept = self.prefix_seconds > 0
        warm = f"; {self.seconds - self.prefix_seconds:.3g} s where its prefix is kept" if kept else ""
        calls = f"{self.unet_calls}, {self.unet_gradient} with gradient, {self.recomputed} of them a second time"
        return {
            "step": f"{self.batch} samples, {self.seconds:.3g} s{warm}",
            "UNet calls a step": calls + (f"; {self.prefix_calls} fewer where its prefix is kept" if kept else ""),
            "FLOPs a sample": f"{self.flops / self.batch / 1e12:.3g} TFLOP, {self.flops / self.seconds / 1e12:.3g} TFLOP/s",
            "peak memory": f"{self.peak_bytes / 2**30:.2f} GiB",
            "run": f"{self.steps:,} steps, {self.samples:,} samples, {self.flops * self.steps * self.world / 1e15:.3g} PFLOP",
            "time": f"{_duration(self.total_seconds)} of training steps, validation and pictures not counted",
        }


def plan(
    module: LightningModule, batch: dict[str, list], steps: int, world: int = 1, first_epochs_steps: int | None = None
) -> Plan:
    """Measure one training step, forward and backward, under the caller's precision; weights and gradients are left as they were.

    Args:
        module: a TextCraftor on its device.
        batch: as training_step takes it.
        steps: training batches of the run and process.
        world: processes.
        first_epochs_steps: batches until each kept prefix has been met once; all by default.
    """
    cache, module.prefix = module.prefix, None
    logs = module.__dict__.get("log"), module.__dict__.get("log_dict")
    module.log = module.log_dict = lambda *args, **kwargs: None
    calls: list[bool] = []
    hook = module.backbone.unet.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def step() -> None:
        module.training_step(batch, 0).backward()
        module.zero_grad(set_to_none=True)

    try:
        with FlopCounterMode(display=False) as counter:
            step()
        if module.chain.keep_activations == "auto":
            step()  # now it is known what fits
        calls.clear()
        seconds = _timed(step, module)
        counted, prefix_seconds, prefix_calls = list(calls), 0.0, 0
        if cache is not None:
            prefix_calls = module.first_gradient_step
            prefix_seconds = _timed(lambda: module.run_prefix(batch["prompts"], batch["seeds"]), module)
    finally:
        hook.remove()
        module.prefix = cache
        for name, value in zip(("log", "log_dict"), logs, strict=True):
            module.__dict__.pop(name) if value is None else module.__dict__.__setitem__(name, value)
    forwards = len(counted) - sum(counted)
    first_time = len(module.chain) - forwards
    numbers = {"unet_calls": len(counted), "unet_gradient": sum(counted), "recomputed": max(0, sum(counted) - first_time)}
    numbers |= {"prefix_calls": prefix_calls, "prefix_seconds": prefix_seconds, "first_epochs_steps": first_epochs_steps or steps}
    return Plan(len(batch["prompts"]), steps, world, seconds, float(counter.get_total_flops()), _peak(module), **numbers)


def _timed(work: Callable[[], Any], module: LightningModule) -> float:
    cuda = module.device.type == "cuda"
    torch.cuda.synchronize() if cuda else None
    began = time.monotonic()
    work()
    torch.cuda.synchronize() if cuda else None
    return time.monotonic() - began


def _peak(module: LightningModule) -> int:
    """Of the device; on a CPU of the process. AdamW's two moments, which the first update adds, are counted in."""
    moments = sum(2 * p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    if module.device.type == "cuda":
        return torch.cuda.max_memory_allocated() + moments
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource is not None else 0) + moments


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
