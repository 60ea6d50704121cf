"""Numbers that show a hacked reward without being one: diversity over seeds, drift of the text, clamped pixels."""

from __future__ import annotations

import torch
from torch import Tensor

MEASURES = ("diversity", "saturation", "text_drift")


def diversity(embeds: Tensor) -> Tensor:
    """How far each of S images of one prompt is from the others: [S], the mean of 1 - cosine to them.

    Its mean over the images is the mean pairwise distance; it falls to 0 when every seed gives the same picture.

    Args:
        embeds: image embeddings of length one [S, D], S at least 2.
    """
    count = len(embeds)
    if count < 2:
        raise ValueError(f"diversity of {count} images: accepted: 2 or more seeds of a prompt")
    embeds = embeds.double()
    return ((count - embeds @ embeds.sum(0)) / (count - 1)).clamp_min(0).float()


def saturation(images: Tensor) -> Tensor:
    """Share [B] of values at the ends of the range, in images [B, 3, H, W] in [0, 1]: what decoding clamped."""
    return ((images <= 0) | (images >= 1)).float().mean((1, 2, 3))


def text_drift(tuned: Tensor, original: Tensor) -> Tensor:
    """How far each prompt's embedding moved: [B], |tuned - original| / |original| over prompt_embeds [B, L, D]."""
    return torch.linalg.vector_norm(tuned - original, dim=(1, 2)) / torch.linalg.vector_norm(original, dim=(1, 2))
