"""Frozen networks in the precision they run in, and the kernels they run on."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # Lightning's names
MATMUL = ("highest", "high", "medium")


def lower_frozen(models: Iterable[nn.Module], dtype: torch.dtype) -> Callable[[], None]:
    """Hold the frozen matrices and kernels of models in autocast's dtype; returns what puts the fp32 weights back.

    Autocast casts them at every call, and each step that keeps its activations keeps a copy of them: a fp32 UNet of 860 million
    weights costs 1.7 GB a kept step. Held in that dtype nothing is cast, and every result is the same to the bit. Only linear
    and convolution layers are touched, since autocast runs norms and embeddings in fp32. The fp32 weights wait in main memory.
    """
    masters: list[tuple[nn.Parameter, Tensor]] = []
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                for parameter in layer.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.dtype == torch.float32:
                        masters.append((parameter, parameter.data.cpu()))
                        parameter.data = parameter.data.to(dtype)

    def restore() -> None:
        for parameter, master in masters:
            parameter.data = master.to(parameter.device)

    return restore


def speed_up(unet: nn.Module, vae: nn.Module, compile: bool = False, channels_last: bool = False) -> None:
    """Lay convolutions out channels-last, and compile UNet and decoder (torch.compile, in place: names do not change)."""
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if compile:
        unet.compile()
        vae.decoder.compile()


def set_matmul(precision: str) -> None:
    """Of fp32 matrix products: highest (fp32), high (TF32 on NVIDIA), medium (bf16).

    Raises:
        ValueError: another word.
    """
    if precision not in MATMUL:
        raise ValueError(f"matmul={precision}: accepted are {', '.join(MATMUL)}")
    torch.set_float32_matmul_precision(precision)
