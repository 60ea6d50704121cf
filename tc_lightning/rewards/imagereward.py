"""ImageReward: a BLIP trained on people's rankings of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tc_lightning.pixels import CLIP_MEAN, CLIP_STD
from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.blip import read_blip_reward
from tc_lightning.rewards.checkpoints import hub_file, local_path
from tc_lightning.rewards.loading import load_tokenizer
from tc_lightning.rewards.preprocess import check_preprocess, tower_pixels

REPOSITORY, FILENAME = "THUDM/ImageReward", "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_LENGTH = 35


class ImageReward(Reward):
    """(r - mean) / std of the published training set, about -2 to 2 (Xu et al. 2023).

    Args:
        checkpoint: file in the layout of ImageReward.pt, or hub id of a repository with that file.
        revision: branch, tag or commit of the hub id.
        config: med_config.json as a path or mapping, the published one by default; see :func:`read_blip_reward`.
        tokenizer, tokenizer_revision: folder or hub id of BERT's tokenizer.
        weight, name: as in :class:`Reward`.
        preprocess: "scorer" (bicubic, short side, centre crop) or "avgpool".
        dtype: dtype of the network, fp32 by default; the head stays in fp32.
        raw: give r itself.
        sha256: expected hash of the file.
    """

    def __init__(
        self,
        checkpoint: str | Path = REPOSITORY,
        revision: str | None = None,
        config: str | Path | Mapping | None = None,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        tokenizer_revision: str | None = None,
        weight: float = 1.0,
        preprocess: str = "scorer",
        dtype: torch.dtype | str | None = None,
        raw: bool = False,
        sha256: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.fit = "avgpool" if check_preprocess(preprocess) == "avgpool" else "crop"
        self.raw = raw
        path = local_path(checkpoint) or hub_file(str(checkpoint), FILENAME, revision, sha256)
        self.network, config = read_blip_reward(path, config, sha256)
        self.cast(dtype)
        self.tokenizer = load_tokenizer(tokenizer, tokenizer_revision)
        if len(self.tokenizer) > config["vocab_size"]:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, ImageReward's text encoder {config['vocab_size']}")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B]; prompts are cut at 35 tokens."""
        pixels = tower_pixels(images, self.network.image_size, CLIP_MEAN, CLIP_STD, self.fit)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(images.device)
        scores = self.network(pixels, tokens.input_ids, tokens.attention_mask)
        return scores if self.raw else (scores - MEAN) / STD
