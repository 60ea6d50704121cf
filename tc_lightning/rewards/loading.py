"""A CLIP from a transformers folder, a hub id or an open_clip file."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from tc_lightning.pixels import CLIP_MEAN, CLIP_STD
from tc_lightning.rewards.base import as_dtype
from tc_lightning.rewards.checkpoints import check_names, check_sha256, local_path, refused_pickle
from tc_lightning.rewards.openclip import clean_prompt, clip_from_file
from tc_lightning.rewards.towers import CLIPTower, shared_tower

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def load_clip(
    checkpoint: str | Path,
    revision: str | None = None,
    config: str | Path | Mapping | None = None,
    tokenizer: str | Path | None = None,
    tokenizer_revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    sha256: str | None = None,
) -> CLIPTower:
    """The frozen CLIP of a checkpoint; rewards that ask for the same one get the same object.

    Args:
        checkpoint: transformers folder, hub id, or a file in open_clip's layout.
        revision: branch, tag or commit of a hub id.
        config: architecture, see :func:`open_clip_config`; a folder or hub id brings its own.
        tokenizer: folder or hub id; by default the checkpoint itself, where it has tokenizer files.
        tokenizer_revision: revision of the tokenizer's hub id.
        dtype: dtype of the tower; fp32 by default, whatever the file holds.
        sha256: expected hash of a file.
    """
    path = local_path(checkpoint)
    where = str(path.resolve()) if path else str(checkpoint)
    is_file = path is not None and path.is_file()
    if is_file and tokenizer is None:
        raise ValueError(f"{path} is a single file, so tokenizer=<folder or hub id> is needed")
    if is_file:
        check_sha256(path, sha256)  # also where the tower is already loaded
    has_tokenizer = path is not None and any((path / name).exists() for name in TOKENIZER_FILES)
    if tokenizer is None or has_tokenizer:
        tokenizer, tokenizer_revision = where, revision

    def load() -> CLIPTower:
        if is_file:
            clip, (mean, std) = clip_from_file(path, config, sha256), (CLIP_MEAN, CLIP_STD)
        else:
            clip, (mean, std) = clip_from_folder(where, revision), pixel_statistics(where, revision)
        tower = CLIPTower(clip, load_tokenizer(tokenizer, tokenizer_revision), mean, std, clean_prompt if is_file else None)
        return tower.to(as_dtype(dtype)) if dtype is not None else tower

    key = (where, revision, repr(config), str(tokenizer), tokenizer_revision, str(dtype and as_dtype(dtype)))
    return shared_tower(key, load)


def clip_from_folder(checkpoint: str, revision: str | None = None) -> CLIPModel:
    """CLIPModel in fp32 of a transformers folder or hub id; every weight must be in it.

    Raises:
        OSError: not there, or no network.
        ValueError: weights are missing, unexpected or of another shape.
    """
    try:
        clip, info = CLIPModel.from_pretrained(
            checkpoint,
            revision=revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
        )
    except pickle.UnpicklingError as error:
        raise refused_pickle(checkpoint, error) from error
    except SafetensorError as error:
        raise ValueError(f"{checkpoint} has a safetensors file that is not whole: {error}") from error
    shapes = [f"{name} {tuple(found)} instead of {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    check_names(checkpoint, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes)
    return clip


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(str(source), revision=revision or "main")


def pixel_statistics(source: str | Path, revision: str | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a folder's or hub id's image processor; CLIP's where it has none."""
    for filename in ("preprocessor_config.json", "processor_config.json"):
        path = _optional_file(str(source), filename, revision)
        if path is not None:
            content = json.loads(path.read_text())
            content = content.get("image_processor", content)
            if "image_mean" in content:
                return tuple(content["image_mean"]), tuple(content["image_std"])
    return CLIP_MEAN, CLIP_STD


def _optional_file(source: str, filename: str, revision: str | None) -> Path | None:
    if Path(source).is_dir():
        path = Path(source) / filename
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(source, filename, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None
