"""HPSv2: a CLIP ViT-H/14 fine-tuned on people's preferences between images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.checkpoints import hub_file, local_path
from tc_lightning.rewards.loading import load_clip
from tc_lightning.rewards.preprocess import check_preprocess
from tc_lightning.rewards.towers import cosine

REPOSITORY = "xswu/HPSv2"
FILES = {
    "2.0": ("HPS_v2_compressed.pt", "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1"),
    "2.1": ("HPS_v2.1_compressed.pt", "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"),
}


class HPSv2(Reward):
    """Raw cosine of an image and its prompt, about 0.27 in version 2.0; the versions are not comparable (Wu et al. 2023).

    Args:
        checkpoint: file in open_clip's layout, or hub id of a repository with the published file names.
        version: "2.0" (TextCraftor's tables) or "2.1"; chooses the file of a hub id.
        revision: branch, tag or commit of the hub id.
        config: architecture of the file, as in :class:`CLIPScore`.
        tokenizer, tokenizer_revision: folder or hub id of CLIP's tokenizer.
        weight, name: as in :class:`Reward`.
        preprocess: "scorer" (the hpsv2 package: longest side, black margins) or "avgpool".
        dtype: dtype of the tower, fp32 by default.
        sha256: expected hash of a local file; published files are always checked.

    Raises:
        ValueError: unknown version, wrong hash or layout.
    """

    def __init__(
        self,
        checkpoint: str | Path = REPOSITORY,
        version: str = "2.0",
        revision: str | None = None,
        config: str | Path | Mapping | None = "ViT-H-14",
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        tokenizer_revision: str | None = None,
        weight: float = 1.0,
        preprocess: str = "scorer",
        dtype: torch.dtype | str | None = None,
        sha256: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        version = str(version).removeprefix("v")
        if version not in FILES:
            raise ValueError(f"HPSv2 version {version!r} is not one of {', '.join(FILES)}")
        self.fit = "avgpool" if check_preprocess(preprocess) == "avgpool" else "pad"
        path = local_path(checkpoint)
        if path is None:
            filename, published = FILES[version]
            path = hub_file(str(checkpoint), filename, revision, sha256 or (published if checkpoint == REPOSITORY else None))
        self.tower = load_clip(path, None, config, tokenizer, tokenizer_revision, dtype, sha256)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos [B] in [-1, 1]."""
        return cosine(self.tower.image_embeds(images, self.fit), self.tower.text_embeds(prompts))
