"""Stage 3: the denoising UNet on latents, told by CLIP's frozen text tower."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import constant, guidance_pair
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.pretrain.clip import tokenize
from tc_lightning.pretrain.stage import Workshop, fit, half
from tc_lightning.pretrain.vae import scenes
from tc_lightning.tiny.captions import Scene, read, write
from tc_lightning.tiny.model import SAMPLING, make_noise_scheduler, make_unet
from tc_lightning.tiny.oracle import failure, judge, look
from tc_lightning.tiny.shapes import captions, change_one_fact, draw

BATCH = 64
POOL = 40_000  # drawings, encoded once
DROP = 0.1  # captions left empty, so that guidance has something to guide away from
MISSTATE = 0.25  # captions that get one fact wrong, as captions found on the web do: what tuning can mend later


def train_unet(shop: Workshop, tokenizer: CLIPTokenizer) -> None:
    """Plain noise-prediction loss; the weights kept are the running average."""
    torch.manual_seed(derive_seed(shop.seed, 3))
    vae = AutoencoderKL.from_pretrained(shop.folder / "vae", torch_dtype=torch.float32).eval()
    clip = CLIPModel.from_pretrained(shop.folder / "clip", torch_dtype=torch.float32)
    text_encoder = clip.text_model.requires_grad_(False).eval()
    half(text_encoder, shop.folder / "text_encoder")
    noise_scheduler = make_noise_scheduler()
    noise_scheduler.save_pretrained(shop.folder / "scheduler")
    drawn, latents = _pool(shop, vae)
    unet = make_unet()

    def loss(step: int) -> Tensor:
        seed = derive_seed(shop.seed, 3, step)
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        index = torch.randint(len(drawn), (BATCH,), generator=generator)
        with torch.no_grad():
            prompts = [alt_text(drawn[i], rng) for i in index.tolist()]
            embeds = text_encoder(tokenize(tokenizer, prompts)).last_hidden_state
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(1000, (BATCH,), generator=generator)
        noisy = noise_scheduler.add_noise(latents[index].float(), noise, timesteps)
        return (unet(noisy, timesteps, embeds).sample - noise).square().mean()

    unet = fit(shop, "unet", unet, loss, shop.steps(3150), 6e-4, ema_decay=0.998)
    half(unet, shop.folder / "unet")
    shop.finish("unet", **measure_unet(Backbone.load(shop.folder)))


def alt_text(scene: Scene, rng: random.Random) -> str:
    """A caption as pictures on the web have them: sometimes none, often incomplete, sometimes wrong in one fact."""
    if rng.random() < DROP:
        return ""
    said = change_one_fact(scene, rng) if rng.random() < MISSTATE else scene
    return write(said, rng, rng.choice((0.0, 0.3)))


@torch.no_grad()
def _pool(shop: Workshop, vae: AutoencoderKL) -> tuple[list[Scene], Tensor]:
    drawn = scenes("train", POOL if shop.effort >= 1 else 2_000, derive_seed(shop.seed, 3))
    path = shop.folder / "latents.pt"
    if path.exists():
        return drawn, torch.load(path, weights_only=True)
    shop.say(f"unet: encoding {len(drawn)} drawings")
    batches = [drawn[i : i + 250] for i in range(0, len(drawn), 250)]
    encoded = [vae.encode(draw(batch, derive_seed(shop.seed, 3, n)) * 2 - 1).latent_dist.mean for n, batch in enumerate(batches)]
    latents = (torch.cat(encoded) * vae.config.scaling_factor).half()
    torch.save(latents, path)
    return drawn, latents


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: list[str],
    seeds: list[int],
    guidance_scale: float = SAMPLING["guidance_scale"],
    steps: int = SAMPLING["steps"],
) -> Tensor:
    """Images [B, 3, 32, 32] of prompts, one noise seed each."""
    chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale)
    images = []
    for start in range(0, len(prompts), 64):
        some = slice(start, start + 64)
        embeds = guidance_pair(backbone.encode([""]), backbone.encode(prompts[some]))
        latents = chain.run(gaussian(seeds[some], backbone.latent_shape), constant(embeds))
        images.append(backbone.decode(latents))
    return torch.cat(images)


def measure_unet(backbone: Backbone, count: int = 512, guidance_scale: float = SAMPLING["guidance_scale"]) -> dict[str, float]:
    """Strict obedience and partial agreement on held-out prompts, and the share of failures that are of alignment."""
    prompts = captions(count, seed=0, split="heldout")
    images = sample(backbone, prompts, list(range(count)), guidance_scale)
    scores = judge(images, prompts)
    reasons = [failure(reading, read(prompt)) for reading, prompt in zip(look(images), prompts, strict=True)]
    failed = [reason for reason in reasons if reason]
    return {
        "strict": (scores == 1).float().mean().item(),
        "partial": scores.mean().item(),
        "failures_of_alignment": failed.count("alignment") / max(len(failed), 1),
    }
