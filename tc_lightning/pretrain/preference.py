"""Stage 5: a preference model, CLIP fine-tuned on pairs of images of one prompt (as PickScore was on people's choices).

The pairs are the base model's own images of training prompts, the better one named by the oracle; and drawings with one
fact wrong against right ones. So it knows of the base model's mistakes what the CLIP that conditions it does not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from tc_lightning.backbone import Backbone
from tc_lightning.noise import derive_seed
from tc_lightning.pretrain.clip import embed, tokenize
from tc_lightning.pretrain.stage import Workshop, fit, half
from tc_lightning.pretrain.unet import sample
from tc_lightning.tiny.captions import write
from tc_lightning.tiny.oracle import judge
from tc_lightning.tiny.shapes import captions, change_one_fact, draw, sample_scene

PROMPTS = 3000  # of the training split, two images each
BATCH = 32  # pairs of generated images and as many of drawings


@dataclass
class Pairs:
    """Prompts with two images each [P, 2, 3, 32, 32] and the oracle's scores [P, 2]."""

    prompts: list[str]
    images: Tensor
    scores: Tensor

    def decided(self) -> list[int]:
        """Pairs in which the oracle prefers one image."""
        return (self.scores[:, 0] != self.scores[:, 1]).nonzero().flatten().tolist()


def make_pairs(backbone: Backbone, prompts: list[str], seed: int) -> Pairs:
    """Two images of each prompt from the base model, judged."""
    doubled = [prompt for prompt in prompts for _ in range(2)]
    images = sample(backbone, doubled, [derive_seed(seed, index) for index in range(len(doubled))])
    scores = judge(images, doubled)
    return Pairs(prompts, images.unflatten(0, (-1, 2)), scores.view(-1, 2))


def _pool(shop: Workshop) -> Pairs:
    path = shop.folder / "pairs.pt"
    if path.exists():
        return Pairs(**torch.load(path, weights_only=True))
    shop.say(f"preference: {2 * PROMPTS} images of the base model")
    count = PROMPTS if shop.effort >= 1 else 64
    pairs = make_pairs(Backbone.load(shop.folder), captions(count, 5, "train", 0.1), derive_seed(shop.seed, 5))
    torch.save(vars(pairs), path)
    return pairs


def train_preference(shop: Workshop, tokenizer: CLIPTokenizer) -> None:
    """Minimise -log softmax(s_better - s_worse), s = exp(logit_scale) cos, over both kinds of pairs (Kirstain et al. 2023)."""
    pairs = _pool(shop)
    decided = pairs.decided()
    clip = CLIPModel.from_pretrained(shop.folder / "clip", torch_dtype=torch.float32)
    clip.logit_scale.requires_grad_(False)  # else the loss is lowered by scale alone

    def loss(step: int) -> Tensor:
        seed = derive_seed(shop.seed, 6, step)
        rng = random.Random(seed)
        chosen = [rng.choice(decided) for _ in range(BATCH)]
        order = pairs.scores[chosen].argsort(dim=1, descending=True)
        generated = pairs.images[torch.tensor(chosen)[:, None], order]
        scenes = [sample_scene(rng) for _ in range(BATCH)]
        drawn = draw(scenes + [change_one_fact(scene, rng) for scene in scenes], seed).unflatten(0, (2, -1)).transpose(0, 1)
        prompts = [pairs.prompts[index] for index in chosen] + [write(scene, rng) for scene in scenes]
        return preference_loss(clip, torch.cat([generated, drawn]), tokenize(tokenizer, prompts))

    fit(shop, "preference", clip, loss, shop.steps(900), 3e-4)
    half(clip, shop.folder / "preference")
    tokenizer.save_pretrained(shop.folder / "preference")
    shop.finish("preference", **measure_preference(shop, tokenizer))


def preference_loss(clip: CLIPModel, images: Tensor, input_ids: Tensor) -> Tensor:
    """Mean loss of pairs [P, 2, 3, 32, 32], the better image first, under their prompts [P, L]."""
    image, text = embed(clip, images.flatten(0, 1), input_ids)
    similarity = F.cosine_similarity(image.unflatten(0, (-1, 2)), text[:, None], dim=-1)
    return -F.log_softmax(clip.logit_scale.exp() * similarity, dim=1)[:, 0].mean()


@torch.no_grad()
def pair_accuracy(clip: CLIPModel, tokenizer: CLIPTokenizer, pairs: Pairs) -> float:
    """Share of decided pairs in which CLIP prefers the image that the oracle prefers."""
    chosen = pairs.decided()
    image, text = embed(clip, pairs.images[chosen].flatten(0, 1), tokenize(tokenizer, [pairs.prompts[i] for i in chosen]))
    similarity = F.cosine_similarity(image.unflatten(0, (-1, 2)), text[:, None], dim=-1)
    return (similarity.argmax(1) == pairs.scores[chosen].argmax(1)).float().mean().item()


def measure_preference(shop: Workshop, tokenizer: CLIPTokenizer) -> dict[str, float]:
    """Pair accuracy on held-out prompts, beside the plain CLIP's."""
    pairs = make_pairs(Backbone.load(shop.folder), captions(384 if shop.effort >= 1 else 64, 6, "heldout"), 6)
    clips = {n: CLIPModel.from_pretrained(shop.folder / n, torch_dtype=torch.float32).eval() for n in ("preference", "clip")}
    figures = {f"pair_accuracy_{name}": pair_accuracy(clip, tokenizer, pairs) for name, clip in clips.items()}
    return {**figures, "pairs": len(pairs.decided())}
