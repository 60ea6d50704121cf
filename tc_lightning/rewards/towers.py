"""A frozen CLIP as rewards use it: images and prompts to embeddings of length one."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedTokenizerBase

from tc_lightning.pixels import CLIP_MEAN, CLIP_STD
from tc_lightning.rewards.preprocess import tower_pixels
from tc_lightning.rewards.shared import once

TEXT_CACHE_SIZE = 4096  # prompts; 16 MB at width 1024
TEXT_BATCH = 8  # always this many at once, see _encode

_towers: "WeakValueDictionary[Hashable, CLIPTower]" = WeakValueDictionary()
_lock = threading.Lock()


class CLIPTower(nn.Module):
    """Image and text encoder of a CLIP with their projections; frozen, always in eval mode.

    Args:
        clip: a transformers CLIPModel.
        tokenizer: its tokenizer; prompts are cut at the tower's limit, as CLIP does.
        mean, std: pixel normalisation, three numbers each.
        clean: what is done to a prompt before its tokenizer; nothing by default.

    Raises:
        ValueError: the tokenizer does not fit the text encoder.
    """

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.clean = clean or str
        self.mean, self.std = tuple(mean), tuple(std)
        self.image_size = clip.config.vision_config.image_size
        text = clip.config.text_config
        self.max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        if len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the text encoder {text.vocab_size}: they do not belong together"
            )
        if text.eos_token_id not in (
            2,
            tokenizer.eos_token_id,
        ):  # 2: transformers pools at the highest id, as OpenAI's code
            raise ValueError(
                f"the text encoder pools at token {text.eos_token_id}, but the tokenizer ends prompts with {tokenizer.eos_token_id}"
            )

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned temperature: a scalar."""
        return self.clip.logit_scale.float().exp()

    def image_embeds(self, images: Tensor, fit: str = "crop") -> Tensor:
        """Unit embeddings [B, D], fp32, of images [B, 3, H, W] in [0, 1]; `fit` as in :func:`preprocess.tower_pixels`."""

        def make() -> Tensor:
            pixels = tower_pixels(images, self.image_size, self.mean, self.std, fit)
            pooled = self.clip.vision_model(pixel_values=pixels.to(self.clip.dtype)).pooler_output
            return unit(self.clip.visual_projection(pooled))

        return once(("image_embeds", id(self), fit), images, make)

    def text_embeds(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [B, D], fp32, without gradient; each prompt is computed once and kept (the last 4096 of them)."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        known = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        # Tensors made in inference mode (Lightning validates in it) could not enter a later graph.
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), TEXT_BATCH):
                batch = new[start : start + TEXT_BATCH]
                known.update(zip(batch, self._encode(batch).unbind()[: len(batch)], strict=True))
            for prompt in dict.fromkeys(prompts):
                self._cache[prompt] = known[prompt]
                self._cache.move_to_end(prompt)
            while len(self._cache) > TEXT_CACHE_SIZE:
                self._cache.popitem(last=False)
            return torch.stack([known[prompt] for prompt in prompts])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """input_ids [B, L], cut at the tower's limit with the end token kept."""
        tokens = self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return tokens.input_ids.to(self.clip.device)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        # Matrix products round differently for different numbers of rows. What is new depends on what was met before, so a
        # resumed run would get embeddings, and then gradients, that differ in the last bit: the number is always the same.
        prompts = [*prompts, *prompts[-1:] * (TEXT_BATCH - len(prompts))]
        # No attention mask: CLIP's attention is causal, so what follows the end token does not reach it.
        pooled = self.clip.text_model(input_ids=self.tokenize(prompts)).pooler_output
        return unit(self.clip.text_projection(pooled))

    def train(self, mode: bool = True) -> "CLIPTower":
        """Does nothing: a tower is always in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable, *args, **kwargs) -> "CLIPTower":
        self._cache.clear()  # of another device or dtype from now on
        forget(self)
        return super()._apply(fn, *args, **kwargs)


def unit(embeds: Tensor) -> Tensor:
    """Rows scaled to length one, in fp32 (fp64 stays)."""
    return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


def cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Row-wise product of unit embeddings: [B]."""
    return (images * texts.to(images.dtype)).sum(-1)


def shared_tower(key: Hashable, load: Callable[[], CLIPTower]) -> CLIPTower:
    """The tower already loaded from the same source, or load(). A tower is shared until it is moved or cast."""
    with _lock:
        tower = _towers.get(key)
        if tower is None:
            tower = _towers[key] = load()
        return tower


def forget(tower: CLIPTower) -> None:
    """Takes a tower out of those that :func:`shared_tower` gives."""
    for key in [key for key, known in list(_towers.items()) if known is tower]:
        del _towers[key]
