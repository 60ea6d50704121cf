"""LAION's aesthetic predictor, trained on people's ratings of pictures; it never sees the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.checkpoints import read_state_dict, url_file
from tc_lightning.rewards.head import LinearHead
from tc_lightning.rewards.loading import load_clip
from tc_lightning.rewards.preprocess import check_preprocess

URL = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class Aesthetic(Reward):
    """Linear head on the unit image embedding of OpenAI's CLIP ViT-L/14, about 1-10 (Schuhmann 2022, improved-aesthetic-predictor).

    Args:
        checkpoint: file of the head (Linear at layers.0/2/4/6/7, any widths); None downloads the published one.
        clip: transformers folder, hub id, or open_clip file of the CLIP it stands on.
        revision: branch, tag or commit of the CLIP's hub id.
        config, tokenizer: of an open_clip file, as in :class:`CLIPScore`.
        weight, name: as in :class:`Reward`.
        preprocess: "scorer" or "avgpool".
        dtype: dtype of the tower, fp32 by default; the head stays in fp32.
        sha256: expected hash of the head's file; the published one is always checked.

    Raises:
        ValueError: the head's width is not that of the CLIP's embedding.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        clip: str | Path = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        config: str | Path | Mapping | None = None,
        tokenizer: str | Path | None = None,
        weight: float = 1.0,
        preprocess: str = "scorer",
        dtype: torch.dtype | str | None = None,
        sha256: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.fit = "avgpool" if check_preprocess(preprocess) == "avgpool" else "crop"
        path = url_file(URL, SHA256) if checkpoint is None else Path(checkpoint)
        self.head = LinearHead.from_state_dict(read_state_dict(path, sha256), str(path))
        self.tower = load_clip(clip, revision, config, tokenizer, dtype=dtype)
        width = self.tower.clip.config.projection_dim
        if self.head.width != width:
            raise ValueError(
                f"the aesthetic head {path} takes embeddings of width {self.head.width}, but the CLIP {clip} gives {width}"
            )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Ratings [B]; the prompts do not matter."""
        return self.head(self.tower.image_embeds(images, self.fit))
