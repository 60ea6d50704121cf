"""Images and their scores in batches of one shape, so that no score depends on what else is made beside it.

Matrix and convolution kernels order their sums by the shape of the batch, and on a CPU by the number of threads. One image
alone and the same image among eight differ by about 1e-6 for that reason, and a score of 20 by about 2e-5. Here a batch
has always the same number of rows, short ones being filled up, and a CPU always one thread: then scores are bit-equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tc_lightning.measures import diversity, saturation, text_drift
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.towers import CLIPTower
from tc_lightning.sampling import Sampler


@dataclass(frozen=True, eq=False)
class Scorer:
    """(prompts [B], seeds [B]) -> images [B, 3, H, W] in [0, 1] on the CPU, and their scores [B] by name.

    Args:
        sampler: makes the images.
        rewards: the scores; weights play no part.
        each: seeds a prompt; rows of one prompt stand together. Diversity is measured where it is at least 2.
        micro_batch: images that are made and scored at once, always so many.
    """

    sampler: Sampler
    rewards: RewardMix
    each: int = 1
    micro_batch: int = 8

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and fp32 scores: each reward, saturation, text_drift, and diversity where a reward has a CLIP."""
        images: list[Tensor] = []
        columns: dict[str, list[Tensor]] = {}
        with one_thread(self.sampler.backbone.device):
            for texts, numbers, count in filled(prompts, seeds, self.micro_batch):
                made = self.sampler(texts, numbers)
                images.append(made[:count])
                for name, column in self._score(made, texts).items():
                    columns.setdefault(name, []).append(column[:count].cpu())
        found = {name: torch.cat(parts) for name, parts in columns.items()}
        if "embeds" in found:
            embeds = found.pop("embeds").split(self.each)
            found["diversity"] = torch.cat([diversity(part) for part in embeds])
        return torch.cat(images), found

    def _score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        backbone, on_device = self.sampler.backbone, images.to(self.sampler.backbone.device)
        found = {name: value.float() for name, value in self.rewards(on_device, prompts)[1].items()}
        found["saturation"] = saturation(images)
        found["text_drift"] = torch.zeros(len(images))
        if self.sampler.original is not None:
            found["text_drift"] = text_drift(backbone.encode(prompts), backbone.encode(prompts, self.sampler.original))
        tower = find_tower(self.rewards)
        if tower is not None and self.each > 1:
            found["embeds"] = tower.image_embeds(on_device)
        return found


def filled(prompts: Sequence[str], seeds: Sequence[int], rows: int) -> Iterator[tuple[list[str], list[int], int]]:
    """Batches of exactly `rows` (prompts, seeds, how many of them count); a short one is filled with its first row."""
    for start in range(0, len(prompts), rows):
        texts, numbers = list(prompts[start : start + rows]), list(seeds[start : start + rows])
        missing = rows - len(texts)
        yield texts + texts[:1] * missing, numbers + numbers[:1] * missing, len(texts)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One CPU thread where the work is the CPU's, the former number afterwards; nothing changes for other devices."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_tower(rewards: torch.nn.Module) -> CLIPTower | None:
    """The first CLIP among some rewards: diversity is measured with it."""
    return next((module for module in rewards.modules() if isinstance(module, CLIPTower)), None)
