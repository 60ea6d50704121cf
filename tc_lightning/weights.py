"""Weights of any origin into a model: what is read, and an error that names the key where it does not fit."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tc_lightning.single_file import UNET, VAE, plain_text_state, text_from_original

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)


class WeightsError(ValueError):
    """A file could not be read as weights, or a key in it does not fit; the message names the file and the key."""


def is_file(source: str | Path) -> bool:
    """Whether a source names a single file of weights."""
    return Path(source).suffix in SUFFIXES


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .ckpt, .pth, .pt or .bin file by name, on the CPU; pickled code is never run.

    Raises:
        WeightsError: no such file, truncated, or not a file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not held:
        raise WeightsError(f"{path} holds no state dict but {type(held).__name__}: accepted is a dict from names to tensors")
    odd = next((key for key, value in held.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise WeightsError(f"{path} holds {type(held[odd]).__name__} at {odd!r}: accepted is a dict from names to tensors")
    return dict(held)


def _keys(path: Path) -> list[str]:
    """Names alone: of a large .safetensors file nothing else is read."""
    if path.suffix != ".safetensors":
        return list(read_weights(path))
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    what = next(iter(str(error).splitlines()), type(error).__name__)
    return WeightsError(f"{path} is no readable file of weights (truncated or foreign): {what}")


def read_text_encoder(path: str | Path) -> dict[str, Tensor]:
    """The text encoder in a file of any known layout, with bare keys and in fp32.

    Known: transformers 4 and 5, DDP's `module.` prefix (the published TextCraftor checkpoint), Stable Diffusion 1 and 2 in one
    file, SDXL's first encoder, a `clip_l` file.

    Raises:
        WeightsError: names the first key where the file is none of these.
    """
    state = read_weights(path)
    found = text_from_original(state)
    if found is None:
        raise WeightsError(f"{path} holds no CLIP text encoder: among {len(state)} keys, the first is {next(iter(state))!r}")
    return {key: value.float() for key, value in found.items()}


def fit(model: nn.Module, state: Mapping[str, Tensor], source: str | Path, part: str) -> nn.Module:
    """Load a state dict into a model whole.

    Raises:
        WeightsError: names the first key that is missing, unknown or of another shape.
    """
    mine = {key: tuple(value.shape) for key, value in plain_text_state(model.state_dict()).items()}
    theirs = {key: tuple(value.shape) for key, value in plain_text_state(state).items()}
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            got, wanted = (f"of shape {shapes[key]}" if key in shapes else "absent" for shapes in (theirs, mine))
            raise WeightsError(f"{source} does not fit as {part}: {key} is {got} there, {wanted} in the model")
    prefixed = any(key.startswith("text_model.") for key in model.state_dict())
    model.load_state_dict({f"text_model.{key}" if prefixed else key: value for key, value in plain_text_state(state).items()})
    return model


def text_encoder_shape(source: str | Path) -> tuple[int, int] | None:
    """(width, layers) where a file or folder holds a CLIP text encoder and nothing else of a model, None where it is more.

    Raises:
        WeightsError: an unreadable file.
    """
    path = Path(source)
    if is_file(path):
        if any(key.startswith((UNET, VAE)) for key in _keys(path)):
            return None
        inner = read_text_encoder(path)
        layers = {key.split(".")[2] for key in inner if key.startswith("encoder.layers.")}
        return inner["embeddings.token_embedding.weight"].shape[1], len(layers)
    config = path / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if values.get("model_type") != "clip_text_model":
        return None
    return values.get("hidden_size", 512), values.get("num_hidden_layers", 12)
