"""The models that are measured: `tiny` (trained, in the package), `mid` and `sd15` (random weights, nothing is downloaded)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from tc_lightning.backbone import TINY, Backbone

SIZES = ("tiny", "mid", "sd15")
PROMPTS = ["a red circle on the left", "two green stars beside a small blue cross", "a pink square", "a big cyan triangle"]
# about 60 million parameters at 32 x 32 latents, 256 pixels
UNET = {"sample_size": 32, "block_out_channels": (64, 160, 320, 320), "cross_attention_dim": 384, "attention_head_dim": 8}
VAE = {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1, "sample_size": 256}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TEXT = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
TOWERS = {  # of the reward: the vision tower's numbers
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "mid": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "image_size": 224, "patch_size": 16},
    "sd15": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "image_size": 224, "patch_size": 14},
}


def make_backbone(size: str) -> Backbone:
    """The model of a size, frozen, fp32, on the CPU; the same weights every time."""
    if size == "tiny":
        return Backbone.load("tiny")
    if size == "sd15":
        return Backbone.load("sd15", random_weights=True, architecture="sd15")
    if size != "mid":
        raise SystemExit(f"size={size}: accepted are {', '.join(SIZES)}")
    tokenizer = CLIPTokenizer.from_pretrained(str(TINY / "tokenizer"), model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT, **ends)).eval()
    parts = {"vae": AutoencoderKL(**VAE, **BLOCKS), "unet": UNet2DConditionModel(**UNET)}
    return Backbone(tokenizer, text_encoder, noise_scheduler=DDIMScheduler(**NOISE), source={"source": "mid"}, **parts)


class Tower(nn.Module):
    """A reward: the image's embedding along a fixed direction, average-pooled pixels; images [B, 3, H, W] -> [B]."""

    def __init__(self, size: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        numbers = TOWERS[size]
        config = CLIPVisionConfig(**numbers, intermediate_size=4 * numbers["hidden_size"], projection_dim=64)
        self.pixels = numbers["image_size"]
        self.vision = CLIPVisionModelWithProjection(config).eval()
        self.register_buffer("direction", torch.randn(64))

    def forward(self, images: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(images, self.pixels) * 4 - 2
        return F.normalize(self.vision(pixel_values=pooled).image_embeds, dim=-1) @ self.direction
