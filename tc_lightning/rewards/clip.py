"""CLIP score: the cosine between an image and its prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.loading import load_clip
from tc_lightning.rewards.preprocess import check_preprocess
from tc_lightning.rewards.towers import cosine


class CLIPScore(Reward):
    """Raw cosine cos(I(x), T(p)) of a frozen CLIP (Radford et al. 2021; TextCraftor's constraint uses ViT-g-14).

    Args:
        checkpoint: transformers folder, hub id, or a file in open_clip's layout (.pt, .bin, .safetensors).
        revision: branch, tag or commit of a hub id.
        config: architecture of an open_clip file: a name such as "ViT-g-14", a path to open_clip_config.json, or a mapping.
        tokenizer: folder or hub id, where the checkpoint has no tokenizer files.
        weight, name: as in :class:`Reward`.
        preprocess: "scorer" (bicubic, short side, centre crop) or "avgpool" (TextCraftor's training code).
        dtype: dtype of the tower, fp32 by default.
    """

    def __init__(
        self,
        checkpoint: str | Path = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
        revision: str | None = None,
        config: str | Path | Mapping | None = None,
        tokenizer: str | Path | None = None,
        weight: float = 1.0,
        preprocess: str = "scorer",
        dtype: torch.dtype | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.fit = "avgpool" if check_preprocess(preprocess) == "avgpool" else "crop"
        self.tower = load_clip(checkpoint, revision, config, tokenizer, dtype=dtype)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos [B] in [-1, 1]."""
        return cosine(self.tower.image_embeds(images, self.fit), self.tower.text_embeds(prompts))
