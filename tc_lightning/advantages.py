"""How much better than usual for its prompt an image was: DDPO's baseline."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class PromptStatistics:
    """Mean and standard deviation of a prompt's last rewards (Black et al., ICLR 2024, section 6.1).

    A prompt with fewer than `least` rewards so far is judged by the whole batch instead.

    Args:
        size: rewards kept for each prompt.
        least: rewards that a prompt must have for statistics of its own, at least 2.
        clip: advantages are cut to [-clip, clip].

    Raises:
        ValueError: numbers out of range.
    """

    def __init__(self, size: int = 16, least: int = 4, clip: float = 5.0) -> None:
        if least < 2 or size < least or not clip > 0:
            raise ValueError(f"size={size}, least={least}, clip={clip}: accepted: 2 <= least <= size, clip above 0")
        self.size, self.least, self.clip = size, least, clip
        self.rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Advantages [B] of rewards [B], which are taken into the statistics first; not finite where a reward is not."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            if math.isfinite(reward):
                self.rewards.setdefault(prompt, deque(maxlen=self.size)).append(reward)
        advantages = torch.empty_like(rewards)
        for row, prompt in enumerate(prompts):
            own = self.rewards.get(prompt, ())
            usual = torch.tensor(own, dtype=torch.float64) if len(own) >= self.least else rewards.double()
            advantages[row] = (rewards[row].double() - usual.mean()) / (usual.std(correction=0) + 1e-8)
        return advantages.clamp(-self.clip, self.clip)

    def state_dict(self) -> dict[str, list[float]]:
        """The rewards kept, by prompt."""
        return {prompt: list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on from there."""
        self.rewards = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in state.items()}
