"""The weighted sum of rewards that a run climbs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tc_lightning.rewards.base import FunctionReward, Reward, check_values
from tc_lightning.rewards.shared import shared_features


class RewardMix(nn.Module):
    """Weighted sum of named rewards, sum_i w_i R_i (TextCraftor, Eq. 7 without its sign); each term keeps its own epoch mean.

    Args:
        rewards: mapping from name to reward; or give them by keyword. A plain callable ``f(images, prompts) -> [B]`` is taken as a
            :class:`FunctionReward` of weight 1.
        dtype: dtype of all towers, e.g. ``"bfloat16"`` on a GPU; None keeps what each reward has (fp32).

    Raises:
        ValueError: no reward, a name that is no identifier or is "total", or a value that is no reward.

    Example:
        >>> mix = RewardMix(brightness=lambda images, prompts: images.mean((1, 2, 3)))
        >>> total, scores = mix(torch.full((2, 3, 8, 8), 0.5), ["a", "b"])
        >>> total
        tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward | Callable] | None = None,
        /,
        *,
        dtype: torch.dtype | str | None = None,
        **named: Reward | Callable,
    ) -> None:
        super().__init__()
        both = {**(rewards or {}), **named}
        if not both:
            raise ValueError("a reward mix needs at least one reward, for example RewardMix(clip=CLIPScore())")
        self.rewards = nn.ModuleDict({_check_name(name): _as_reward(name, value) for name, value in both.items()})
        for reward in self.rewards.values():
            reward.cast(dtype)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Total [B] and scores {name: [B]}, both with their graph; the detached scores enter the epoch means.

        Args:
            images: [B, 3, H, W] in [0, 1].
            prompts: B strings.

        Raises:
            ValueError: shape, range, type or number of the inputs.
            FloatingPointError: a score is not finite; names the reward and the prompt.
        """
        with shared_features():
            scores = {name: reward.evaluate(images, prompts) for name, reward in self.rewards.items()}
        check_values(images, scores, prompts)
        for name, reward in self.rewards.items():
            reward.record(scores[name])
        return sum(self.rewards[name].weight * value for name, value in scores.items()), scores

    def compute(self) -> dict[str, Tensor]:
        """Mean of each score since the last reset, over all processes."""
        return {name: reward.compute() for name, reward in self.rewards.items()}

    def reset(self) -> None:
        """Empties the epoch means."""
        for reward in self.rewards.values():
            reward.reset()

    def require_differentiable(self) -> None:
        """Refuses rewards with no gradient, where a loss is made of the mix.

        Raises:
            ValueError: names the rewards without a gradient.
        """
        lacking = [name for name, reward in self.rewards.items() if not reward.differentiable and reward.weight > 0]
        if lacking:
            raise ValueError(
                f"reward {', '.join(lacking)} has no gradient, so reward back-propagation cannot climb it: "
                "use method=ddpo, or give it weight 0 to have it logged only"
            )


def _check_name(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or name == "total" or hasattr(nn.ModuleDict, name):
        raise ValueError(f"{name!r} cannot name a reward: letters, digits and underscores, and not 'total' or a dict's method")
    return name


def _as_reward(name: str, value: Reward | Callable) -> Reward:
    if isinstance(value, Reward):
        value.name = name
        return value
    if callable(value):
        return FunctionReward(value, name=name)
    raise ValueError(f"reward {name} is a {type(value).__name__}; expected a Reward or a callable (is `_target_` missing?)")
