"""Which steps of the chain run and which carry gradient.

A schedule is called as `schedule(chain, x, conditioning, start=0) -> latents`: it takes latents x [B, C, h, w] that
enter step `start` to clean latents x_0 [B, C, h, w] (LowVariance: several for each row). `first_gradient_step(T)` is the
first of T steps that may carry gradient; the steps before it run without. `start` may be any step up to that one: what
lies before it was computed elsewhere. Raises ValueError for a later start.

A schedule that draws has `at(step, seeds)`, which fixes the draw of one training step: a pure function of its `seed`,
the number of the step and, for noise, the noise seeds of the rows. Called without, it draws as in step 0.

What a step costs: `cost(T)`, evaluations of the UNet a sample (guidance makes each one two rows), for T = 25 and the
defaults here. With `keep_activations` below "all" each backward runs its step a second time.

| schedule | source | forwards | backwards |
|---|---|---|---|
| FullChain | DRaFT, TextCraftor Eq. 7 | T = 25 | T = 25 |
| LastK(k=5) | DRaFT-K, TextCraftor Algorithm 1 | T = 25 | k = 5 |
| RandomK | AlignProp | T = 25 | mean of k = 13 |
| LowVariance(samples=2) | DRaFT-LV | T + samples = 27 | 1 + samples = 3 |
| DRTune(k=5) | DRTune | T = 25 | k = 5 |
| SingleStep(fraction=0.25) | ReFL | 22.5 in the mean | 1 |
| StepList | - | T = 25 | as many as listed |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tc_lightning import ddim
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning
from tc_lightning.gradient_steps import check_count, check_list, check_start, listed, noise_pred_of, sparse, truncated, within
from tc_lightning.noise import derive_seed, gaussian


class Cost(NamedTuple):
    """UNet evaluations a sample; means where a schedule draws."""

    forwards: float
    backwards: float


def at_step(schedule: Callable[..., Tensor], step: int, seeds: Sequence[int]) -> Callable[..., Tensor]:
    """The schedule of one training step: one that draws with its draw fixed, any other as it is."""
    return schedule.at(step, seeds) if hasattr(schedule, "at") else schedule


@dataclass(frozen=True)
class FullChain:
    """Gradient through all T steps (DRaFT, Clark et al., ICLR 2024; TextCraftor Eq. 7 without truncation)."""

    def first_gradient_step(self, steps: int) -> int:
        """Always 0."""
        return 0

    def cost(self, steps: int) -> Cost:
        """T forwards, T backwards."""
        return Cost(steps, steps)

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        check_start(self, start, chain)
        return chain.run(x, conditioning, start)


@dataclass(frozen=True)
class LastK:
    """Gradient through the last K steps (TextCraftor Algorithm 1, K = 5, its Table 4 compares 5, 10 and 15; DRaFT-K).

    Raises ValueError for K below 1 at construction, and for K above the number of steps when that is known.
    """

    k: int = 5

    def __post_init__(self) -> None:
        check_count("k", self.k, "gradient steps")

    def first_gradient_step(self, steps: int) -> int:
        """T - K."""
        return steps - within(self.k, steps)

    def cost(self, steps: int) -> Cost:
        """T forwards, K backwards."""
        return Cost(steps, within(self.k, steps))

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        return truncated(chain, x, conditioning, start, check_start(self, start, chain))


@dataclass(frozen=True)
class RandomK:
    """Gradient through the last K steps, K drawn once a training step from low..high (AlignProp, Prabhudesai et al. 2023).

    Between the earliest possible gradient step, T - high, and the drawn one the chain runs without gradient, on the text
    in training. `high` None is T, as published; K is at least 1 here, for a step without gradient teaches nothing. Micro
    batches of one step share the draw. Raises ValueError unless 1 <= low <= high, and for high above the number of steps.
    """

    low: int = 1
    high: int | None = None
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        check_count("low", self.low, "gradient steps")
        if self.high is not None and self.high < self.low:
            raise ValueError(f"low={self.low}, high={self.high}: accepted: 1 <= low <= high, or high null for all steps")

    def at(self, step: int, seeds: Sequence[int]) -> "RandomK":
        """The draw of a training step; `seeds` play no part, so every process draws the same K."""
        return replace(self, step=step)

    def first_gradient_step(self, steps: int) -> int:
        """T - high, the earliest that may be drawn."""
        return steps - self._high(steps)

    def cost(self, steps: int) -> Cost:
        """T forwards, (low + high) / 2 backwards."""
        return Cost(steps, (self.low + self._high(steps)) / 2)

    def k(self, steps: int) -> int:
        """The K of this step."""
        return self.low + derive_seed(self.seed, 21, self.step) % (self._high(steps) - self.low + 1)

    def _high(self, steps: int) -> int:
        return steps if self.high is None and self.low <= steps else within(self.high or self.low, steps)

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        check_start(self, start, chain)
        return truncated(chain, x, conditioning, start, len(chain) - self.k(len(chain)))


@dataclass(frozen=True)
class LowVariance:
    """DRaFT-LV (Clark et al., ICLR 2024, Algorithm 1): the last step's gradient averaged over fresh noise.

    The chain runs with gradient in its last step; then x_0, without its gradient, is noised to that step's level n times
    and denoised in one call each. Returns [(1 + n) B, C, h, w], the chain's own first: the prompts repeat. The paper adds
    the 1 + n gradients, a loss that averages over images divides them by 1 + n. Raises ValueError for n below 1.
    """

    samples: int = 2
    seed: int = 0
    step: int = 0
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_count("samples", self.samples, "noised copies")

    def at(self, step: int, seeds: Sequence[int]) -> "LowVariance":
        """The noise of a training step: a row's is a function of its own noise seed and the step."""
        return replace(self, step=step, seeds=tuple(seeds))

    def first_gradient_step(self, steps: int) -> int:
        """T - 1."""
        return steps - 1

    def cost(self, steps: int) -> Cost:
        """T + n forwards, 1 + n backwards."""
        return Cost(steps + self.samples, 1 + self.samples)

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        first = check_start(self, start, chain)
        latents = [truncated(chain, x, conditioning, start, first)]
        x0, alpha_bar = latents[0].detach(), chain.alpha_bar(first)[0]
        kept = chain.kept(1 + self.samples)
        for number in range(self.samples):
            salt = derive_seed(self.seed, 22, self.step, number)
            noise = gaussian(self.seeds or range(len(x)), x.shape[1:], salt).to(x0)
            noised = ddim.add_noise(x0, noise, alpha_bar)
            noise_pred = noise_pred_of(chain, noised, first, conditioning, keep=self.samples - number <= kept)
            latents.append(ddim.predict_x0(noised, noise_pred, alpha_bar, chain.prediction_type))
        return torch.cat(latents)


@dataclass(frozen=True)
class DRTune:
    """Gradient of any subset of steps with the UNet's input latents detached (DRTune, Wu et al., ECCV 2024, Algorithm 1).

    x_0's gradient reaches each trained step along the linear part of the DDIM steps alone: no Jacobian of the UNet in its
    latents is taken, so early steps can be trained and the gradient neither vanishes nor explodes. The trained steps are
    `k` at equal distances from a drawn first one, or the listed `steps` (-1 is the last). With `early_stop` m the chain
    ends at a drawn one of its last 1 + m steps, with that step's predicted x_0.

    Raises ValueError unless exactly one of k and steps is given, for an empty list, and where the numbers exceed T.
    """

    k: int | None = None
    steps: Sequence[int] | None = None
    early_stop: int = 0
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if (self.k is None) == (self.steps is None):
            raise ValueError(f"k={self.k}, steps={self.steps}: accepted: one of the two, the other null")
        if self.steps is None:
            check_count("k", self.k, "gradient steps")
        else:
            object.__setattr__(self, "steps", check_list(self.steps))
        if self.early_stop < 0:
            raise ValueError(f"early_stop={self.early_stop}: accepted: 0 (run to the end) or more")

    def at(self, step: int, seeds: Sequence[int]) -> "DRTune":
        """The draw of a training step; `seeds` play no part, so every process draws the same steps."""
        return replace(self, step=step)

    def first_gradient_step(self, steps: int) -> int:
        """0 where steps are drawn, else the first one listed."""
        self.chosen(steps)
        return 0 if self.steps is None else min(listed(self.steps, steps))

    def cost(self, steps: int) -> Cost:
        """T - m / 2 forwards, k backwards (fewer where the chain ends before a chosen step)."""
        return Cost(steps - self.early_stop / 2, len(self.chosen(steps)))

    def chosen(self, steps: int) -> list[int]:
        """The trained ones of T steps, as drawn for this training step."""
        if self.early_stop >= steps:
            raise ValueError(f"early_stop={self.early_stop} in a chain of steps={steps}, accepted: less than steps")
        if self.steps is not None:
            return listed(self.steps, steps)
        stride = steps // within(self.k, steps)
        first = derive_seed(self.seed, 23, self.step) % stride
        return [first + number * stride for number in range(self.k)]

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        check_start(self, start, chain)
        chosen = self.chosen(len(chain))
        last = len(chain) - 1 - derive_seed(self.seed, 24, self.step) % (1 + self.early_stop)
        stop = max(last, chosen[0]) if self.early_stop else None  # a chain without a trained step would teach nothing
        return sparse(chain, x, conditioning, start, chosen, detach=True, predict_at=stop)


@dataclass(frozen=True)
class SingleStep:
    """ReFL (ImageReward, Xu et al., NeurIPS 2023, Algorithm 1): gradient through one late step's predicted x_0.

    The chain runs without gradient to a step drawn from its last `fraction` (published: one of the last 10 of 40) and
    ends there, with what that one call predicts for x_0. Raises ValueError for a fraction outside (0, 1].
    """

    fraction: float = 0.25
    seed: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}, accepted: above 0, at most 1 (any step)")

    def at(self, step: int, seeds: Sequence[int]) -> "SingleStep":
        """The draw of a training step; `seeds` play no part, so every process draws the same step."""
        return replace(self, step=step)

    def first_gradient_step(self, steps: int) -> int:
        """The first of the last `fraction` of T steps (at least one)."""
        return steps - max(1, round(self.fraction * steps))

    def cost(self, steps: int) -> Cost:
        """The drawn step's number of forwards in the mean, 1 backward."""
        return Cost((self.first_gradient_step(steps) + 1 + steps) / 2, 1)

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        first = check_start(self, start, chain)
        drawn = first + derive_seed(self.seed, 25, self.step) % (len(chain) - first)
        return sparse(chain, x, conditioning, start, [drawn], predict_at=drawn)


@dataclass(frozen=True)
class StepList:
    """Gradient of the listed steps (-1 is the last): each one's noise prediction, in its latents too.

    Elsewhere the noise prediction is a constant and only the linear part of the DDIM step carries gradient on. The last K
    steps listed are LastK(K), all steps FullChain. Raises ValueError for an empty list or a step outside the chain.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_list(self.steps))

    def first_gradient_step(self, steps: int) -> int:
        """The first one listed."""
        return min(listed(self.steps, steps))

    def cost(self, steps: int) -> Cost:
        """T forwards, a backward for each step listed."""
        return Cost(steps, len(listed(self.steps, steps)))

    def __call__(self, chain: Chain, x: Tensor, conditioning: Conditioning, start: int = 0) -> Tensor:
        check_start(self, start, chain)
        return sparse(chain, x, conditioning, start, listed(self.steps, len(chain)))
