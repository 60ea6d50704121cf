"""Noise as a function of its seed: never of batch size, order, device, rank or worker.

Numbers are drawn on the CPU in fp32 and moved by the caller, since generators of different devices disagree.
"""

import hashlib
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_SEED = 2**63


def gaussian(seeds: Sequence[int], shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Standard normal noise [B, *shape], fp32 on the CPU; row b depends on (seeds[b], shape, salt) alone.

    salt 0 is torch's own stream for that seed, the x_T of a picture; any other salt is an independent draw for the same
    seed, for instance the noise of step i when eta > 0. Raises ValueError for a seed outside [0, 2**63).
    """
    if len(seeds) == 0:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(shape, generator=_generator(seed, salt), dtype=torch.float32) for seed in seeds])


def derive_seed(*values: int) -> int:
    """A seed in [0, 2**63) from any integers: the same for ever, on every machine, and sensitive to their order.

    It serves wherever a random choice is f(seed, step, ...). Python's own hash() has no such promise.
    """
    text = ",".join(str(operator.index(value)) for value in values)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(seed: int, salt: int) -> torch.Generator:
    seed = operator.index(seed)
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f"seed={seed}, accepted: 0 <= seed < 2**63")
    return torch.Generator("cpu").manual_seed(derive_seed(seed, salt) if salt else seed)
