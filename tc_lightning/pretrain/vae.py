"""Stages 1 and 4: the autoencoder, trained on drawings; then its decoder alone."""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderKL
from torch import nn

from tc_lightning.noise import derive_seed
from tc_lightning.pretrain.stage import Workshop, fit, half
from tc_lightning.tiny.captions import Scene, write
from tc_lightning.tiny.model import make_vae
from tc_lightning.tiny.oracle import judge
from tc_lightning.tiny.shapes import draw, sample_scene

BATCH = 64
KL_WEIGHT = 1e-6
NOISE = 0.15  # of the unit-variance latents, at most


def train_vae(shop: Workshop) -> None:
    """Minimise absolute error plus a faint KL term; the scaling factor brings the latents to unit variance."""
    torch.manual_seed(derive_seed(shop.seed, 1))
    vae = make_vae()

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(derive_seed(shop.seed, 1, step))
        images = draw([sample_scene(rng) for _ in range(BATCH)], derive_seed(shop.seed, 1, step)) * 2 - 1
        generator = torch.Generator().manual_seed(derive_seed(shop.seed, 1, step))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded.float() - images
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    fit(shop, "vae", vae, loss, shop.steps(1500), 2e-3)
    with torch.no_grad():
        latents = vae.encode(draw(scenes("train", 512, 9), 9) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    half(vae, shop.folder / "vae")
    shop.finish("vae", **measure_vae(AutoencoderKL.from_pretrained(shop.folder / "vae", torch_dtype=torch.float32)))


def train_decoder(shop: Workshop) -> None:
    """More training of the decoder alone, on faintly noisy latents: sharper edges, and robust to what a UNet leaves.

    The encoder stays as it is, so UNets trained on its latents stay valid.
    """
    torch.manual_seed(derive_seed(shop.seed, 4))
    vae = AutoencoderKL.from_pretrained(shop.folder / "vae", torch_dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def loss(step: int) -> torch.Tensor:
        seed = derive_seed(shop.seed, 4, step)
        rng = random.Random(seed)
        images = draw([sample_scene(rng) for _ in range(BATCH)], seed) * 2 - 1
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean.float()
                strength = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator) / vae.config.scaling_factor
                latents = latents + strength * torch.randn(latents.shape, generator=generator)
            decoded = vae.decode(latents).sample
        error = decoded.float() - images
        return error.abs().mean() + error.square().mean()

    fit(shop, "decoder", decoder, loss, shop.steps(700), 1e-3)
    half(vae, shop.folder / "vae")
    shop.finish("decoder", **measure_vae(AutoencoderKL.from_pretrained(shop.folder / "vae", torch_dtype=torch.float32)))


def scenes(split: str, count: int, seed: int) -> list[Scene]:
    """`count` random scenes of a split."""
    rng = random.Random(f"{split} {seed}")
    return [sample_scene(rng, split) for _ in range(count)]


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, count: int = 512) -> dict[str, float]:
    """PSNR in dB and the share of held-out renders, and of their reconstructions, that the oracle passes strictly."""
    drawn = scenes("heldout", count, 1)
    rng = random.Random(1)
    prompts = [write(scene, rng) for scene in drawn]
    images = draw(drawn, 1)
    decoded = vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.clamp(-1, 1) / 2 + 0.5
    error = (decoded - images).square().mean((1, 2, 3))
    return {
        "psnr_db": (-10 * error.log10()).mean().item(),
        "renders_strict": (judge(images, prompts) == 1).float().mean().item(),
        "reconstructions_strict": (judge(decoded, prompts) == 1).float().mean().item(),
    }
