"""Files of published scorers: found, checked, and read as data only."""

import hashlib
import pickle
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import torch
from torch import Tensor

NAMES_SHOWN = 5


def local_path(checkpoint: str | Path) -> Path | None:
    """The path, if `checkpoint` is one that exists; None if it looks like a hub id (owner/name).

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(checkpoint).expanduser()
    if path.exists():
        return path
    text = str(checkpoint)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix.lower() not in _SUFFIXES:
        return None
    raise FileNotFoundError(f"no such checkpoint: {text} (give an existing file or folder, or a hub id owner/name)")


_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".json"}


def hub_file(repository: str, filename: str, revision: str | None = None, sha256: str | None = None) -> Path:
    """A file of a hub repository, downloaded once, its hash checked when one is known."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(repository, filename, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise OSError(
            f"cannot get {filename} of {repository} (revision {revision or 'main'}) from the hub: {error}. Without a network, give "
            "checkpoint=<local file>; HF_HOME, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN are honoured"
        ) from error
    check_sha256(path, sha256)
    return path


def check_sha256(path: Path, sha256: str | None) -> None:
    """Compares a file's hash with the published one; None checks nothing.

    Raises:
        ValueError: they differ.
    """
    if sha256 is None:
        return
    stat = path.stat()
    found = _sha256(path, stat.st_size, stat.st_mtime_ns)
    if not found.startswith(sha256):
        raise ValueError(
            f"{path} has sha256 {found}, expected {sha256}: the download is damaged or it is another file. Delete it and try again"
        )


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state_dict(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, on the CPU; one level of ``{"state_dict": ...}`` is opened, no code is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong hash, a pickle that would run code, a damaged file, or no tensors in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    check_sha256(path, sha256)
    content = _read(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise refused_pickle(path, error) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole torch checkpoint: {error}") from error


def refused_pickle(source: str | Path, error: Exception) -> ValueError:
    """The error for a pickle that holds more than tensors."""
    reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "not only tensors")
    return ValueError(
        f"{source} is refused: it is a pickle with more than tensors in it, and reading it could run code. "
        f"Save its state dict alone, or as .safetensors ({reason.strip()})"
    )


def check_layout(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Compares names and shapes of a state dict with what a module has.

    Raises:
        ValueError: lists the first missing, unexpected and differently shaped names.
    """
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    missing, unexpected = [name for name in expected if name not in state], [name for name in state if name not in expected]
    check_names(source, missing, unexpected, shapes)


def check_names(source: str, missing: list[str], unexpected: list[str], shapes: list[str]) -> None:
    """Raises ValueError with the first names if any list has one."""
    parts = [
        f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise ValueError(f"{source} does not have the expected layout; {'; '.join(parts)}. Is config= that of the checkpoint?")


def url_file(url: str, sha256: str) -> Path:
    """A file downloaded once into torch's hub folder, its hash checked."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / unquote(url.rsplit("/", 1)[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise OSError(f"cannot download {url}: {error}. Get it by other means and give checkpoint=<local file>") from error
    check_sha256(path, sha256)
    return path
