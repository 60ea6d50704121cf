"""The shapes world's exact judge as a reward: no learned part, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tc_lightning.rewards.base import Reward
from tc_lightning.tiny.oracle import judge


class Oracle(Reward):
    """Share of a caption's facts that the image shows, read from its pixels alone (tiny/oracle.py).

    Args:
        strict: 1 for full obedience and 0 otherwise, instead of the share.
        weight, name: as in :class:`Reward`.

    Raises (on scoring):
        ValueError: a prompt that is no caption of the shapes world.
    """

    differentiable = False

    def __init__(self, strict: bool = True, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.strict = strict

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] in [0, 1]."""
        try:
            shares = judge(images, prompts)
        except ValueError as error:
            hint = "the oracle (watch=oracle) judges captions of shapes only, for other prompts give watch=none"
            raise ValueError(f"{hint}: {error}") from error
        return ((shares == 1).float() if self.strict else shares).to(images.device)
