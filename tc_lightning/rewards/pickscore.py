"""PickScore: a CLIP fine-tuned on people's choices between two images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.loading import load_clip
from tc_lightning.rewards.preprocess import check_preprocess
from tc_lightning.rewards.towers import cosine

ALL_PAIRS_CHUNK = 4


class PickScore(Reward):
    """exp(logit_scale) cos(I(x), T(p)) of an image and its own prompt, about 20-23 (Kirstain et al. 2023).

    Args:
        checkpoint: transformers folder, hub id, or a file in open_clip's layout.
        processor: folder or hub id that gives the tokenizer, where the checkpoint has none.
        revision, processor_revision: branch, tag or commit of each hub id.
        config: architecture of an open_clip file, as in :class:`CLIPScore`.
        weight, name: as in :class:`Reward`.
        preprocess: "scorer" or "avgpool".
        dtype: dtype of the tower, fp32 by default.
        all_pairs: score each image against all prompts of its chunk of 4, mismatched ones included, as the tables of the
            TextCraftor paper do. Only to compare with them: a sample's score then depends on its neighbours.
    """

    def __init__(
        self,
        checkpoint: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        revision: str | None = None,
        processor_revision: str | None = None,
        config: str | Path | Mapping | None = None,
        weight: float = 1.0,
        preprocess: str = "scorer",
        dtype: torch.dtype | str | None = None,
        all_pairs: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.fit = "avgpool" if check_preprocess(preprocess) == "avgpool" else "crop_down"
        self.all_pairs = all_pairs
        self.tower = load_clip(checkpoint, revision, config, processor, processor_revision, dtype)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scaled cosines [B]."""
        image_embeds, text_embeds = self.tower.image_embeds(images, self.fit), self.tower.text_embeds(prompts)
        if self.all_pairs:
            pairs = zip(image_embeds.split(ALL_PAIRS_CHUNK), text_embeds.split(ALL_PAIRS_CHUNK), strict=True)
            similarity = torch.cat([(image @ text.to(image.dtype).T).mean(1) for image, text in pairs])
        else:
            similarity = cosine(image_embeds, text_embeds)
        return self.tower.logit_scale.to(similarity.dtype) * similarity
