"""Which steps of the chain run and which carry gradient.

A schedule is called as `schedule(chain, x, conditioning, start=0) -> latents`: it takes latents x [B, C, h, w] that
enter step `start` to clean latents x_0 [B, C, h, w]. `first_gradient_step(T)` is the first of T steps that carries
gradient; the steps before it run without. `start` may be any step up to that one: what lies before it was computed
elsewhere. Raises ValueError for a later start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning


@dataclass(frozen=True)
class FullChain:
    """Gradient through all T steps (TextCraftor Eq. 7 without truncation)."""

    def first_gradient_step(self, steps: int) -> int:
        """Always 0."""
        return 0

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        _check_start(self, start, chain)
        return chain.run(x, conditioning, start)


@dataclass(frozen=True)
class LastK:
    """Gradient through the last K steps (TextCraftor Algorithm 1, K = 5; its Table 4 compares 5, 10 and 15).

    Raises ValueError for K below 1 at construction, and for K above the number of steps when that is known.
    """

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} gradient steps, accepted: 1 or more")

    def first_gradient_step(self, steps: int) -> int:
        """T - K."""
        if self.k > steps:
            raise ValueError(f"k={self.k} gradient steps in a chain of steps={steps}, accepted: 1 <= k <= steps")
        return steps - self.k

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        first = _check_start(self, start, chain)
        # no_grad and not a detach afterwards: these steps must not store what no backward will read.
        with torch.no_grad():
            x = chain.run(x, conditioning, start, first)
        return chain.run(x, conditioning, first)


def _check_start(schedule: FullChain | LastK, start: int, chain: Chain) -> int:
    first = schedule.first_gradient_step(len(chain))
    if not 0 <= start <= first:
        raise ValueError(f"start={start}, accepted: 0 to {first}, where gradient begins: {schedule}, T={len(chain)}")
    return first
