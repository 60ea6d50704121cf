"""Prompts to images, one noise seed an image: an image depends on its prompt and seed, not on the batch it is made in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning, constant, guidance_pair, switch, tuned_from
from tc_lightning.noise import gaussian


@torch.no_grad()
def sample(backbone: Backbone, chain: Chain, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of a conditioning for B rows, one seed a row."""
    x = gaussian(seeds, backbone.latent_shape).to(backbone.device)
    return backbone.decode(chain.run(x, conditioning))


@torch.no_grad()
def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance_scale: float = 7.5,
    timestep_spacing: str = "trailing",
    tuned_fraction: float = 1.0,
    original: nn.Module | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Images [P * S, 3, H, W] in [0, 1] on the CPU, every prompt with every seed, prompts outermost.

    Args:
        backbone: the model; its text encoder is the tuned one.
        prompts: P texts.
        seeds: S noise seeds.
        tuned_fraction: the tuned text is used where t < 1000 * tuned_fraction, the original before.
        original: the text encoder before tuning; needed for a tuned_fraction below 1.

    Raises:
        ValueError: no prompt or no seed; a tuned_fraction below 1 without `original`.
    """
    if isinstance(prompts, str) or not prompts or not seeds:
        raise ValueError("generate needs a list of prompts and a list of seeds, at least one of each")
    if tuned_fraction < 1 and original is None:
        raise ValueError(f"tuned_fraction={tuned_fraction} needs the original text encoder: original=...")
    chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale, timestep_spacing)
    first = tuned_from(chain.timesteps, tuned_fraction)
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    for start in range(0, len(rows), batch_size):
        texts, numbers = zip(*rows[start : start + batch_size], strict=True)
        conditioning = constant(_pair(backbone, texts, backbone.text_encoder))
        if first > 0 and original is not None:
            conditioning = switch(_pair(backbone, texts, original), conditioning, first)
        images.append(sample(backbone, chain, conditioning, numbers).cpu())
    return torch.cat(images)


def _pair(backbone: Backbone, prompts: Sequence[str], text_encoder: nn.Module) -> Tensor:
    return guidance_pair(backbone.encode([""], text_encoder), backbone.encode(prompts, text_encoder))
