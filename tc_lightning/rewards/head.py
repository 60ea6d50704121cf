"""The small network that LAION's aesthetic predictor and ImageReward put on an embedding."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from tc_lightning.rewards.checkpoints import check_layout, check_names

LINEAR_LAYERS = (0, 2, 4, 6, 7)


class LinearHead(nn.Module):
    """Five linear layers, a scalar out; no activations between them, and the dropout of training is gone.

    Args:
        widths: six widths, from the embedding's to 1, e.g. (768, 1024, 128, 64, 16, 1).
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Module()
        for index, (wide_in, wide_out) in zip(LINEAR_LAYERS, pairwise(widths), strict=True):
            self.layers.add_module(str(index), nn.Linear(wide_in, wide_out))
        self.width = widths[0]

    def forward(self, embeds: Tensor) -> Tensor:
        """Scores [B] of embeddings [B, D]."""
        for layer in self.layers.children():
            embeds = nn.functional.linear(embeds.to(layer.weight.dtype), layer.weight, layer.bias)
        return embeds.squeeze(-1)

    def _apply(self, fn: Callable, *args, **kwargs) -> "LinearHead":
        # Never below fp32, whatever a parent is cast to: a score near 5 would lose two digits in bf16.
        before = {name: value.data for name, value in self.named_parameters()}
        super()._apply(fn, *args, **kwargs)
        for name, value in self.named_parameters():
            if value.dtype in (torch.bfloat16, torch.float16):
                value.data = before[name].to(value.device)
        return self

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], source: str) -> "LinearHead":
        """The head of a state dict with names layers.{0,2,4,6,7}.{weight,bias}; widths are read from it.

        Raises:
            ValueError: names or shapes do not fit.
        """
        weights = [f"layers.{index}.weight" for index in LINEAR_LAYERS]
        wanted = weights + [f"layers.{index}.bias" for index in LINEAR_LAYERS]
        check_names(source, [n for n in wanted if n not in state], [n for n in state if n not in wanted], [])
        flat = [name for name in weights if state[name].ndim != 2]
        check_names(source, [], [], [f"{name} {tuple(state[name].shape)}" for name in flat])
        head = cls((state[weights[0]].shape[1], *(state[name].shape[0] for name in weights)))
        check_layout(head.state_dict(), state, source)
        head.load_state_dict(state)
        return head
