"""How schedules run a chain: without gradient up to a step, or with the gradient of chosen steps alone; and their checks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tc_lightning import ddim
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning


def truncated(chain: Chain, x: Tensor, conditioning: Conditioning, start: int, first: int) -> Tensor:
    """x_0 [B, C, h, w] with the gradient of the steps from `first` on."""
    # no_grad and not a detach afterwards: these steps must not store what no backward will read.
    with torch.no_grad():
        x = chain.run(x, conditioning, start, first)
    return chain.run(x, conditioning, first)


def sparse(
    chain: Chain,
    x: Tensor,
    conditioning: Conditioning,
    start: int,
    chosen: Sequence[int],
    detach: bool = False,
    predict_at: int | None = None,
) -> Tensor:
    """Gradient of the chosen steps' noise predictions alone; x_0 as predicted at step `predict_at`, else at the end."""
    with torch.no_grad():
        x = chain.run(x, conditioning, start, min(chosen))
    last = len(chain) - 1 if predict_at is None else predict_at
    left = [i for i in chosen if i <= last]
    for i in range(min(chosen), last + 1):
        if i in left:
            keep = sum(other >= i for other in left) <= chain.kept(len(left))
            noise_pred = noise_pred_of(chain, x.detach() if detach else x, i, conditioning, keep)
        else:
            with torch.no_grad():
                noise_pred = chain.noise_pred(x, i, conditioning)
        if i == predict_at:
            return ddim.predict_x0(x, noise_pred, chain.alpha_bar(i)[0], chain.prediction_type)
        x = ddim.step(x, noise_pred, *chain.alpha_bar(i), chain.prediction_type)
    return x


def noise_pred_of(chain: Chain, x: Tensor, i: int, conditioning: Conditioning, keep: bool) -> Tensor:
    """The noise prediction [B, C, h, w] of a step, its activations kept for backward or computed again there."""
    if keep or not torch.is_grad_enabled():
        return chain.noise_pred(x, i, conditioning)
    return checkpoint(chain.noise_pred, x, i, conditioning, use_reentrant=False)


def check_start(schedule: Callable[..., Tensor], start: int, chain: Chain) -> int:
    """The schedule's first gradient step; ValueError for a start beyond it."""
    first = schedule.first_gradient_step(len(chain))
    if not 0 <= start <= first:
        raise ValueError(f"start={start}, accepted: 0 to {first}, where gradient begins: {schedule}, T={len(chain)}")
    return first


def check_count(name: str, count: int, what: str) -> None:
    """ValueError below 1."""
    if count < 1:
        raise ValueError(f"{name}={count} {what}, accepted: 1 or more")


def check_list(steps: Sequence[int]) -> tuple[int, ...]:
    """The listed steps; ValueError for none, or the same twice."""
    if len(steps) == 0 or len(set(steps)) < len(steps):
        raise ValueError(f"steps={list(steps)}, accepted: a list of different steps, at least one (schedule.steps)")
    return tuple(int(i) for i in steps)


def within(k: int, steps: int) -> int:
    """k; ValueError above the number of steps."""
    if k > steps:
        raise ValueError(f"k={k} gradient steps in a chain of steps={steps}, accepted: 1 <= k <= steps")
    return k


def listed(chosen: Sequence[int], steps: int) -> list[int]:
    """The listed ones of T steps, counted from the front and in order; ValueError for one outside them."""
    odd = [i for i in chosen if not -steps <= i < steps]
    counted = sorted({i % steps for i in chosen})
    if odd or len(counted) < len(chosen):
        raise ValueError(f"steps={list(chosen)} in a chain of steps={steps}, accepted: different ones of {-steps} to {steps - 1}")
    return counted
