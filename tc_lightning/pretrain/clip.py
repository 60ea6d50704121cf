"""Stage 2: CLIP on drawings and captions, with hard negatives in the batch and auxiliary attribute losses."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from tc_lightning.noise import derive_seed
from tc_lightning.pretrain.stage import Workshop, fit, half
from tc_lightning.pretrain.vae import scenes
from tc_lightning.tiny.captions import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, read, write
from tc_lightning.tiny.model import make_clip
from tc_lightning.tiny.oracle import agreement
from tc_lightning.tiny.shapes import change_one_fact, draw, sample_scene

SCENES = 64  # a batch; each brings a sibling that differs in one fact
FORGET = 0.25  # probability that a caption leaves a fact unsaid
KINDS = (SHAPES, COLOURS, SIZES)
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)


class CLIPWithFacts(nn.Module):
    """CLIP and one linear reading of the facts, shared by image and text embeddings; only CLIP is kept."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        width = sum(len(PLACES) * (len(kind) + 1) for kind in KINDS) + len(BACKGROUNDS)
        self.facts = nn.Linear(clip.config.projection_dim, width)


def train_clip(shop: Workshop, tokenizer: CLIPTokenizer) -> None:
    """Contrastive loss over 2 x 64 pairs plus the attribute losses."""
    torch.manual_seed(derive_seed(shop.seed, 2))
    tokenizer.save_pretrained(shop.folder / "clip")  # as a reward it is a model of its own
    model = CLIPWithFacts(make_clip(tokenizer))

    def loss(step: int) -> Tensor:
        rng = random.Random(derive_seed(shop.seed, 2, step))
        drawn = [sample_scene(rng) for _ in range(SCENES)]
        drawn += [change_one_fact(scene, rng) for scene in drawn]
        prompts = [write(scene, rng, rng.choice((0.0, FORGET))) for scene in drawn]
        images = draw(drawn, derive_seed(shop.seed, 2, step))
        image_embeds, text_embeds = embed(model.clip, images, tokenize(tokenizer, prompts))
        stated = [read(prompt) for prompt in prompts]
        contrast = contrastive(image_embeds, text_embeds, model.clip.logit_scale.exp().clamp(max=100), drawn, stated)
        facts = fact_loss(model.facts(image_embeds), drawn) + fact_loss(model.facts(text_embeds), stated)
        return contrast + 0.5 * facts

    fit(shop, "clip", model, loss, shop.steps(1600), 1e-3)
    half(model.clip, shop.folder / "clip")
    clip = CLIPModel.from_pretrained(shop.folder / "clip", torch_dtype=torch.float32).eval()
    shop.finish("clip", **measure_clip(clip, tokenizer))


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """input_ids [B, L], padded and cut to the tokenizer's length."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def embed(clip: CLIPModel, images: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unnormalised embeddings [B, D] of images [B, 3, 32, 32] in [0, 1] and of prompts."""
    output = clip.vision_model(pixel_values=(images - MEAN) / STD).pooler_output
    return clip.visual_projection(output), clip.text_projection(clip.text_model(input_ids).pooler_output)


def contrastive(image: Tensor, text: Tensor, scale: Tensor, drawn: list[Scene], stated: list[Scene]) -> Tensor:
    """Symmetric cross-entropy; a sibling that the caption also fits is no negative."""
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    count, half_count = len(drawn), len(drawn) // 2
    mask = torch.zeros(count, count, dtype=torch.bool)
    for caption in range(count):
        sibling = (caption + half_count) % count
        mask[sibling, caption] = agreement(drawn[sibling], stated[caption]) == 1.0
    logits = logits.masked_fill(mask, -1e4)
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fact_loss(logits: Tensor, stated: list[Scene]) -> Tensor:
    """Cross-entropy of every stated fact: at each place what shape, colour and size, and the background."""
    sizes = [len(kind) + 1 for kind in KINDS for _ in PLACES] + [len(BACKGROUNDS)]
    targets = torch.tensor([_targets(scene) for scene in stated])
    parts = logits.split(sizes, dim=-1)
    pairs = zip(parts, targets.T, strict=True)
    losses = [F.cross_entropy(part, target, ignore_index=-1, reduction="sum") for part, target in pairs]
    return sum(losses) / len(stated)


def _targets(scene: Scene) -> list[int]:
    at = {thing.place: thing for thing in scene.things}
    row = []
    for kind, name in zip(KINDS, ("shape", "colour", "size"), strict=True):
        for place in PLACES:
            if None in at:  # a place left unsaid says nothing of any place
                row.append(-1)
            elif place not in at:
                row.append(len(kind))
            else:
                value = getattr(at[place], name)
                row.append(-1 if value is None else kind.index(value))
    return [*row, -1 if scene.background is None else BACKGROUNDS.index(scene.background)]


@torch.no_grad()
def measure_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 1000) -> dict[str, float]:
    """Share of held-out drawings whose own caption beats one with a single fact changed."""
    drawn = scenes("heldout", count, 2)
    rng = random.Random(2)
    right = [write(scene, rng) for scene in drawn]
    wrong = [write(change_one_fact(scene, rng), rng) for scene in drawn]
    image, right_text = embed(clip, draw(drawn, 2), tokenize(tokenizer, right))
    _, wrong_text = embed(clip, draw(drawn, 2), tokenize(tokenizer, wrong))
    better = F.cosine_similarity(image, right_text) > F.cosine_similarity(image, wrong_text)
    return {"right_caption": better.float().mean().item()}
