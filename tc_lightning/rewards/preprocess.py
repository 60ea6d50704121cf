"""From images of any size to what a tower sees, differentiably, as each published scorer does it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tc_lightning.pixels import normalize, resize_longest_side_and_pad, resize_short_side
from tc_lightning.rewards.shared import once

PREPROCESS = ("scorer", "avgpool")


def check_preprocess(preprocess: str) -> str:
    """Raises ValueError unless the name is one of PREPROCESS."""
    if preprocess not in PREPROCESS:
        raise ValueError(f"preprocess {preprocess!r} is not one of {', '.join(PREPROCESS)}")
    return preprocess


def tower_pixels(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], fit: str) -> Tensor:
    """Normalised pixels [B, 3, size, size] of images [B, 3, H, W] in [0, 1].

    `fit` is one of

    - "crop": the short side scaled, the centre cropped, an odd margin halved to the even side as torchvision does;
    - "crop_down": the same, an odd margin halved downwards, as transformers' image processor does;
    - "pad": the longest side scaled, the rest black;
    - "avgpool": adaptive average pooling, which distorts non-square images (TextCraftor's training code).

    Scaling is bicubic and antialiased. Where the scorer resizes an 8-bit picture ("crop", "crop_down") the overshoot is clamped to
    [0, 1]; hpsv2 ("pad") resizes floating-point pixels and keeps it.
    """

    if fit == "crop_down" and images.shape[-2] == images.shape[-1]:
        fit = "crop"  # of a square there is no margin: towers that differ in this alone share the resized pixels

    def make() -> Tensor:
        if fit in ("crop", "crop_down"):
            scaled = resize_short_side(images, size)
            top, left = (_margin(side - size, fit) for side in scaled.shape[-2:])
            return scaled[..., top : top + size, left : left + size]
        if fit == "pad":
            return resize_longest_side_and_pad(images, size, pad_value=0.0, clamp=False)
        return F.adaptive_avg_pool2d(images.to(torch.promote_types(images.dtype, torch.float32)), size)

    return normalize(once(("pixels", size, fit), images, make), mean, std)


def _margin(excess: int, fit: str) -> int:
    return excess // 2 if fit == "crop_down" else round(excess / 2)
