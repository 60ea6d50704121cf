"""The embedded model: Stable Diffusion's own classes with small numbers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tc_lightning.tiny.captions import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, SYNONYMS
from tc_lightning.tiny.shapes import CANVAS

WIDTH = 128  # of both CLIP towers, their joint space and the UNet's cross-attention
TOKENS = 32  # maximum prompt length, start and end included
SAMPLING = {"steps": 10, "guidance_scale": 1.5, "timestep_spacing": "trailing"}  # as conf/backbone/tiny.yaml has it


def make_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write and load a byte-level BPE tokenizer in CLIP's file layout, merged for the words of the captions.

    Most of them are one token; "triangle", "purple" and "cyan" are several, because other words' merges come first. Any
    other text falls apart into bytes, so every prompt can be encoded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(_words()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocabulary += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_index(folder: str | Path) -> None:
    """Write model_index.json, which makes the folder a Stable Diffusion pipeline for diffusers."""
    parts = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__, **parts}
    Path(folder, "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _words() -> set[str]:
    kinds = (SHAPES, COLOURS, SIZES, PLACES, BACKGROUNDS, RELATIONS, *SYNONYMS.values())
    words = {word for kind in kinds for phrase in kind for word in phrase.split()}
    words |= set("a an and with beside to the on of at in against background grey".split())
    return {word for word in words if len(word) > 1}


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that every CLIP and GPT-2 vocabulary uses."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(moved)}
    return [table[byte] for byte in kept + moved]


def make_vae() -> AutoencoderKL:
    """Images [B, 3, 32, 32] in [-1, 1] to latents [B, 8, 8, 8]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=CANVAS,
    )


def make_unet() -> UNet2DConditionModel:
    """Noise prediction on latents [B, 8, 8, 8], told prompt_embeds [B, 32, 128]."""
    return UNet2DConditionModel(
        sample_size=CANVAS // 4,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(96, 96),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Text tower of 3 layers and vision tower of 3 layers on 4x4 pixel patches."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **special, "num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    text["pad_token_id"] = tokenizer.pad_token_id
    vision = {**tower, "num_hidden_layers": 3, "image_size": CANVAS, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def make_noise_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule of noise, as published."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
