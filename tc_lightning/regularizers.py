"""Penalties beside the CLIP constraint: each a scalar that the loss adds, times its weight, and that is logged by name.

A penalty is a callable `penalty(step) -> scalar` with a `weight`; `step` is what one training step knows. One that needs
the chain or the original model has `bind(method)`, called once at construction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tc_lightning import ddim
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning, constant, guidance_pair
from tc_lightning.noise import derive_seed, gaussian


@dataclass(frozen=True, eq=False)
class Step:
    """One training step as penalties see it.

    Args:
        latents: x_0 [B, C, h, w].
        conditioning: what the chain was told; tuned in its last step.
        original: the original text at every step.
        scores: every score [B] by name, with its graph.
        seeds: noise seeds of the rows.
        number: the optimizer's steps so far.
        first_gradient_step: of the schedule.
    """

    latents: Tensor
    conditioning: Conditioning
    original: Conditioning
    scores: Mapping[str, Tensor]
    seeds: Sequence[int]
    number: int
    first_gradient_step: int


class Penalty(Protocol):
    """What the loss adds: `weight` times the scalar that a call gives."""

    weight: float

    def __call__(self, step: Step) -> Tensor: ...


def penalties(given: Mapping[str, Penalty] | None, method: Any) -> dict[str, Penalty]:
    """The named penalties, each bound to the method where it asks for that.

    Raises:
        ValueError: a weight below 0, or what a penalty refuses.
    """
    named = dict(given or {})
    for name, penalty in named.items():
        if not penalty.weight >= 0:
            raise ValueError(f"regularizer.{name}.weight={penalty.weight}, accepted: 0 or more")
        if hasattr(penalty, "bind"):
            penalty.bind(method)
    return named


@torch.no_grad()
def original_conditioning(method: Any, prompts: Sequence[str]) -> Conditioning:
    """The text before tuning at every step."""
    embeds = method.backbone.encode(["", *prompts], method.original or method.backbone.text_encoder)
    return constant(guidance_pair(embeds[:1], embeds[1:]))


@dataclass
class NoiseDistance:
    """Mean squared distance of the noise prediction from the original model's: the KL term of DRaFT+ up to a factor.

    DRaFT+ (Clark et al., ICLR 2024, with NVIDIA's regularisation, 2024) sums it over the steps of the chain. Here it is
    estimated at one drawn gradient step: x_0, without its gradient, is noised to that step's level, as in DRaFT-LV. So it
    costs one evaluation with gradient and one without, whatever the schedule. The UNet's original is a frozen copy where
    all its weights learn, and the UNet without its adapters where they do.
    """

    weight: float = 1.0
    seed: int = 0
    chain: Chain | None = field(default=None, repr=False)
    original_unet: Callable[..., Any] | None = field(default=None, repr=False)

    def bind(self, method: Any) -> None:
        """Takes the chain and the original UNet."""
        self.chain, self.original_unet = method.chain, method.backbone.original_unet()

    def __call__(self, step: Step) -> Tensor:
        chain, first = self.chain, step.first_gradient_step
        i = first + derive_seed(self.seed, 26, step.number) % (len(chain) - first)
        x0 = step.latents.detach()
        noise = gaussian(step.seeds, x0.shape[1:], derive_seed(self.seed, 27, step.number)).to(x0)
        x = ddim.add_noise(x0, noise, chain.alpha_bar(i)[0])
        with torch.no_grad():
            original = on_unet(chain, self.original_unet.to(x.device)).noise_pred(x, i, step.original)
        return (chain.noise_pred(x, i, step.conditioning) - original).square().mean()


@dataclass
class EmbeddingDrift:
    """Squared relative distance of the prompt's embedding from the original text encoder's, |c - c_0|^2 / |c_0|^2."""

    weight: float = 1.0

    def bind(self, method: Any) -> None:
        """Raises ValueError where the text encoder does not learn."""
        if method.original is None:
            raise ValueError("regularizer=embedding_drift needs a text encoder that learns: tune.text_encoder=full or lora")
        self._last = len(method.chain) - 1

    def __call__(self, step: Step) -> Tensor:
        tuned, original = (source(self._last)["encoder_hidden_states"] for source in (step.conditioning, step.original))
        drift = (tuned - original).flatten(1).square().sum(1) / original.flatten(1).square().sum(1)
        return drift.chunk(2)[1].mean()


@dataclass
class RewardCeiling:
    """No more reward above a level: a score's part of the loss becomes -w min(R, at) (hinge) or w |R - at| (target).

    ReFL has the hinge, max(0, 2 - R) (Xu et al., NeurIPS 2023). Values are those of the reward's own scale.

    Args:
        at: level by name of the reward.
        target: pull back what lies above the level instead of leaving it alone.
        weight: factor of the whole penalty; 1 gives what is said above.

    Raises:
        ValueError: no level, or a name that is no reward of the run.
    """

    at: Mapping[str, float]
    target: bool = False
    weight: float = 1.0

    def bind(self, method: Any) -> None:
        """Takes the rewards' weights."""
        known = method.reward.rewards
        odd = [name for name in self.at if name not in known]
        if odd or not self.at:
            wrong = f"no reward {odd[0]!r}" if odd else "no level"
            raise ValueError(f"regularizer=hinge or target: {wrong} in at={dict(self.at)}, the run has {', '.join(known)}")
        self._weights = {name: known[name].weight for name in self.at}

    def __call__(self, step: Step) -> Tensor:
        slope = 2.0 if self.target else 1.0
        above = [slope * self._weights[name] * (step.scores[name] - level).clamp(min=0) for name, level in self.at.items()]
        return torch.stack(above).sum(0).mean()


def on_unet(chain: Chain, unet: Callable[..., Any]) -> Chain:
    """The same chain over another UNet."""
    other = copy.copy(chain)
    other.unet = unet
    return other
