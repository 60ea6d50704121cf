"""What the UNet is told at each step.

A Conditioning is a callable: step index (0 is the noisiest) -> keyword arguments of the UNet, with at least
`encoder_hidden_states` [2B, L, D], the null half first ([B, L, D] will do for a chain without guidance). It must be a
pure function of the step: a step whose activations are recomputed asks again. Which steps see the tuned text is decided
here; which steps carry gradient is decided by a schedule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Conditioning = Callable[[int], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Constant:
    """The same embeddings at every step; `unet_kwargs` are further arguments of the UNet (SDXL's added_cond_kwargs)."""

    embeds: Tensor
    unet_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: int) -> dict[str, Any]:
        return {"encoder_hidden_states": self.embeds, **self.unet_kwargs}


@dataclass(frozen=True, eq=False)
class Switch:
    """`original` before step `first_tuned_step`, `tuned` from it on."""

    original: Conditioning
    tuned: Conditioning
    first_tuned_step: int

    def __call__(self, step: int) -> dict[str, Any]:
        return self.tuned(step) if step >= self.first_tuned_step else self.original(step)


def constant(embeds: Tensor, **unet_kwargs: Any) -> Constant:
    """The same embeddings [2B, L, D], null first, at every step. ValueError unless three-dimensional."""
    if embeds.ndim != 3:
        raise ValueError(f"embeds of shape {tuple(embeds.shape)}, accepted: [2B, L, D], or [B, L, D] without guidance")
    return Constant(embeds, unet_kwargs)


def switch(original: Tensor | Conditioning, tuned: Tensor | Conditioning, first_tuned_step: int) -> Switch:
    """The original text before `first_tuned_step`, the tuned text from it on (TextCraftor section 4 and Table 4).

    Each side is embeddings [2B, L, D] or a Conditioning of its own. Step 0 is all tuned, the number of steps is none.
    Raises ValueError for a negative step or for embeddings of different shapes.
    """
    if first_tuned_step < 0:
        raise ValueError(f"first_tuned_step={first_tuned_step}, accepted: 0 (all tuned) or more")
    if isinstance(original, Tensor) and isinstance(tuned, Tensor) and original.shape != tuned.shape:
        raise ValueError(f"original {tuple(original.shape)} and tuned {tuple(tuned.shape)} embeddings differ in shape")
    sides = (constant(side) if isinstance(side, Tensor) else side for side in (original, tuned))
    return Switch(*sides, first_tuned_step)


def guidance_pair(null: Tensor, cond: Tensor) -> Tensor:
    """[2B, L, D], null first, from null [1 or B, L, D] and cond [B, L, D]. Raises ValueError for other shapes."""
    if null.ndim != 3 or null.shape[1:] != cond.shape[1:] or null.shape[0] not in (1, cond.shape[0]):
        shapes = f"null {tuple(null.shape)} and cond {tuple(cond.shape)}"
        raise ValueError(f"{shapes}, accepted: [1 or B, L, D] and [B, L, D]")
    return torch.cat([null.expand_as(cond), cond])


def mix(embeds: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of embeddings of one shape: interpolation and style mixing (TextCraftor Figs. 4 and 5).

    Raises ValueError unless there is one weight per tensor and the weights sum to one within 1e-6; a weight may be
    negative or above one (extrapolation).
    """
    if len(embeds) != len(weights) or not len(embeds):
        raise ValueError(f"{len(embeds)} embeddings and {len(weights)} weights, accepted: as many, at least one")
    total = float(sum(weights))
    if not abs(total - 1.0) <= 1e-6:
        raise ValueError(f"weights {list(weights)} sum to {total:g}, accepted: 1 within 1e-6")
    return sum(weight * embed for weight, embed in zip(weights, embeds, strict=True))


def tuned_from(timesteps: Sequence[int], tuned_fraction: float, num_train_timesteps: int = 1000) -> int:
    """Index of the first step that sees the tuned text: the first with t < num_train_timesteps * tuned_fraction.

    The window is given by time, so it is right for any number of steps and any noise scheduler: 0.6 is the paper's 15
    of 25 (Table 4). `timesteps` decrease; 0 tunes none (their number is returned), 1 tunes all. Raises ValueError for a
    fraction outside [0, 1].
    """
    if not 0.0 <= tuned_fraction <= 1.0:
        raise ValueError(f"tuned_fraction={tuned_fraction}, accepted: 0 (never tuned) to 1 (always)")
    # 1000 * 0.28 is 280.00000000000006, and t = 280 does not belong to the window.
    limit = round(num_train_timesteps * tuned_fraction, 6)
    return next((index for index, t in enumerate(timesteps) if t < limit), len(timesteps))
