"""The CLIP constraint with the text encoder that is being tuned."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tc_lightning.rewards.base import BoundReward
from tc_lightning.rewards.loading import load_clip
from tc_lightning.rewards.preprocess import check_preprocess
from tc_lightning.rewards.towers import cosine, unit


class CLIPTunedScore(BoundReward):
    """cos(I(x), P T_phi(p)) with the live text encoder T_phi (TextCraftor, Eq. 8); gradient through both sides.

    I and the text projection P are those of the CLIP that the text encoder comes from. The live encoder is bound with :meth:`bind`;
    it is not registered here, so its weights appear once in the model, and no text embedding is kept.

    Args:
        checkpoint: the CLIP of the text encoder: transformers folder, hub id, or open_clip file.
        revision, config, tokenizer, weight, preprocess, dtype, name: as in :class:`CLIPScore`.
    """

    def __init__(
        self,
        checkpoint: str | Path = "openai/clip-vit-large-patch14",
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
        self._bound: tuple[nn.Module, PreTrainedTokenizerBase] | None = None

    def bind(self, text_encoder: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> "CLIPTunedScore":
        """Takes the live text encoder (a CLIPTextModel, PEFT-wrapped or not) and its tokenizer.

        Raises:
            ValueError: its width or depth is not that of the CLIP's text tower, so its output has no projection. Stable Diffusion
                2.x is such a case: its text encoder stops at the penultimate layer.
        """
        own, other = self.tower.clip.config.text_config, text_encoder.config
        for key in ("hidden_size", "num_hidden_layers"):
            if getattr(own, key) != getattr(other, key):
                raise ValueError(
                    f"reward {self.name}: the text encoder has {key} {getattr(other, key)}, the CLIP's text tower "
                    f"{getattr(own, key)}, so its output cannot be projected into the CLIP's space (Stable Diffusion 2.x cuts the "
                    "last layer off). Use constraint=clip, or give the CLIP that this text encoder comes from as checkpoint="
                )
        self._bound = (text_encoder, tokenizer or self.tower.tokenizer)  # a tuple: modules in it are not registered
        return self

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """cos [B] in [-1, 1]."""
        return cosine(self.tower.image_embeds(images, self.fit), self._text_embeds(prompts))

    def _text_embeds(self, prompts: Sequence[str]) -> Tensor:
        if self._bound is None:
            raise RuntimeError(f"reward {self.name} scores with the text encoder in training: call bind(text_encoder, tokenizer)")
        text_encoder, tokenizer = self._bound
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=min(tokenizer.model_max_length, self.tower.max_length),
            return_tensors="pt",
        )
        device = next(text_encoder.parameters()).device
        pooled = text_encoder(input_ids=tokens.input_ids.to(device)).pooler_output
        projection = self.tower.clip.text_projection
        return unit(projection(pooled.to(projection.weight.dtype)))
