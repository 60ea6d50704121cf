"""One model as a diffusers folder or as a single file, written and read back with the libraries that people read it with."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import nn

from tc_lightning import single_file
from tc_lightning.backbone import Backbone, save_model

MODELS = ("text_encoder", "vae", "unet")
PRIVATE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
_READ = {"dtype": torch.float32, "safety_checker": None, "feature_extractor": None, "local_files_only": True}


def rounded(backbone: Backbone, dtype: torch.dtype = torch.float32, names: tuple[str, ...] = MODELS) -> Backbone:
    """The model as its shipped weights will be: each number of the named parts rounded to `dtype`, computed in fp32."""
    parts = {name: getattr(backbone, name) for name in MODELS}
    if dtype != torch.float32:
        parts |= {name: copy.deepcopy(parts[name]).to(dtype).float() for name in names}
    return Backbone(backbone.tokenizer, **parts, noise_scheduler=backbone.noise_scheduler, source=dict(backbone.source))


def write_folder(place: Path, backbone: Backbone, dtype: torch.dtype, base: str, original: nn.Module | None = None) -> bool:
    """A whole pipeline for `from_pretrained`; whether the base's safety checker came along.

    Args:
        base: folder or hub id that the safety checker and licence files are taken from.
        original: the text encoder before tuning, written as original_text_encoder/ (no part of the pipeline).
    """
    place.mkdir()
    for name in MODELS:
        save_model(getattr(backbone, name), place / name, dtype)
    if original is not None:
        save_model(original, place / "original_text_encoder", dtype)
    _save_tokenizer(backbone.tokenizer, place / "tokenizer")
    backbone.noise_scheduler.save_pretrained(place / "scheduler")
    checker = _carry_along(base, place)
    (place / "model_index.json").write_text(json.dumps(_index(checker), indent=2) + "\n", encoding="utf-8")
    _forget_paths(place)
    return checker


def read_folder(place: Path, like: Backbone) -> Backbone:
    """The written folder as diffusers loads it, in fp32."""
    return backbone_of(StableDiffusionPipeline.from_pretrained(str(place), **_READ), like)


def write_text_encoder(place: Path, text_encoder: nn.Module, dtype: torch.dtype) -> None:
    """The text encoder alone: a folder for `from_pretrained`."""
    save_model(text_encoder, place, dtype)
    _forget_paths(place)


def read_text_encoder(place: Path, like: Backbone) -> Backbone:
    """`like` with the written text encoder, a folder or a file."""
    again = rounded(like)
    again.replace("text_encoder", place)
    return again


def write_file(place: Path, backbone: Backbone, dtype: torch.dtype, part: str, metadata: Mapping[str, str]) -> None:
    """One .safetensors in the original key layout; part "text_encoder" is the text encoder alone, as ComfyUI's clip_l."""
    text = single_file.plain_text_state(backbone.text_encoder.state_dict())
    if part == "text_encoder":
        state = {f"text_model.{key}": value for key, value in text.items()}
    else:
        is_open_clip = backbone.text_encoder.config.hidden_act == "gelu"  # Stable Diffusion 2's text encoder
        state = single_file.unet_to_original(backbone.unet.state_dict())
        state |= single_file.vae_to_original(backbone.vae.state_dict())
        state |= single_file.text_to_original(text, is_open_clip)
    state = {key: (value.to(dtype) if value.is_floating_point() else value).contiguous() for key, value in state.items()}
    save_file(state, place, metadata={"format": "pt", **metadata})


def read_file(place: Path, like: Backbone) -> Backbone:
    """The whole checkpoint as diffusers' `from_single_file` loads it, in fp32; architecture and tokenizer are `like`'s."""
    with tempfile.TemporaryDirectory() as config:
        _write_configs(Path(config), like)
        return backbone_of(StableDiffusionPipeline.from_single_file(str(place), config=config, **_READ), like)


def read_lora(file: Path, base: Backbone) -> Backbone:
    """The base with adapters beside its weights, as diffusers' `load_lora_weights` puts them."""
    parts = {name: copy.deepcopy(getattr(base, name)) for name in ("text_encoder", "unet")}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(vae=base.vae, tokenizer=base.tokenizer, scheduler=base.noise_scheduler, **parts, **rest)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, local_files_only=True)
    return backbone_of(pipe, base)


def backbone_of(pipe: StableDiffusionPipeline, like: Backbone) -> Backbone:
    """A pipeline's parts; the noise scheduler and the record are `like`'s."""
    parts = {name: getattr(pipe, name) for name in ("tokenizer", *MODELS)}
    return Backbone(**parts, noise_scheduler=like.noise_scheduler, source=dict(like.source))


def _write_configs(folder: Path, backbone: Backbone) -> None:
    """A diffusers folder without weights, from which `from_single_file` takes the architecture."""
    backbone.text_encoder.config.save_pretrained(folder / "text_encoder")
    for name in ("vae", "unet"):
        getattr(backbone, name).save_config(folder / name)
    _save_tokenizer(backbone.tokenizer, folder / "tokenizer")
    backbone.noise_scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_index(False)), encoding="utf-8")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Also vocab.json and merges.txt, which transformers 4 reads and transformers 5 no longer writes."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _forget_paths(place: Path) -> None:
    """Both libraries write into each config where the model lay on this machine."""
    for file in [*place.glob("*.json"), *place.glob("*/*config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in PRIVATE}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _index(checker: bool) -> dict[str, Any]:
    absent = [None, None]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if checker else absent,
        "image_encoder": absent,
        "requires_safety_checker": checker,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"] if checker else absent,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _carry_along(base: str, place: Path) -> bool:
    """The base's safety checker and licence files, from its folder or the hub's store; whether there is a checker."""
    folder = Path(base)
    if not folder.is_dir() and "/" in base and not folder.suffix:
        from huggingface_hub import snapshot_download

        wanted = ["safety_checker/*", "feature_extractor/*", "LICENSE*"]
        with contextlib.suppress(OSError, ValueError):  # no network and not in the store: the card says that it is missing
            folder = Path(snapshot_download(base, allow_patterns=wanted))
    if not folder.is_dir():
        return False
    for file in folder.glob("LICENSE*"):
        shutil.copy(file, place / file.name)
    both = all((folder / name).is_dir() for name in ("safety_checker", "feature_extractor"))
    for name in ("safety_checker", "feature_extractor") if both else ():
        shutil.copytree(folder / name, place / name)
    return both
