"""Checkpoints that are never half: written beside, flushed to the disk, read back, and only then put in the old one's place."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

KEYS = ("state_dict", "optimizer_states", "global_step", "loops")
BLOCK = 2**22  # bytes
_FOREIGN = (
    *(OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
)


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, with the last good one always on the disk.

    <name>.ckpt.part is written and fsynced, its bytes are read back and compared, the old <name>.ckpt becomes
    <name>.previous.ckpt, and a rename puts the new one in its place: whatever happens, one whole file is there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save as described above.

        Raises:
            OSError: not written (a full disk), or read back otherwise than written; the old file is untouched.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            digest = _write(checkpoint, part)
            _read_back(part, digest)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            what = getattr(error, "strerror", None) or str(error).splitlines()[0]
            kept = f"{path} of before is untouched" if path.exists() else "there is none before it"
            raise OSError(getattr(error, "errno", None) or 0, f"the checkpoint {path} was not written ({what}); {kept}") from error
        _keep(path)
        os.replace(part, path)
        _sync(path.parent)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and the one before it."""
        super().remove_checkpoint(path)
        if "://" not in str(path):
            previous(path).unlink(missing_ok=True)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.blake2b()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict[str, Any], part: Path) -> bytes:
    with part.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(checkpoint, hashing)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that reading back asks the disk and not the memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashing.digest.digest()


def _read_back(part: Path, digest: bytes) -> None:
    found = hashlib.blake2b()
    with part.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    if found.digest() != digest:
        raise OSError(0, "read back otherwise than written")


def _keep(path: Path) -> None:
    """Give the old file a second name: at no moment is there none under its own."""
    if not path.exists():
        return
    link = path.with_name(f"{path.name}.link")
    with contextlib.suppress(OSError):  # a file system without links keeps one file, replaced whole
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous(path))


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def previous(path: str | Path) -> Path:
    """Where the checkpoint before this one is."""
    return Path(path).with_suffix(".previous.ckpt")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A training checkpoint as data only; tensors stay on the disk until used.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, foreign, holding code, or a file of weights that is no training checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself looks at no checksum
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"{broken} in it has another checksum than when it was written")
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _FOREIGN as error:
        what = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path} is no readable checkpoint (truncated or foreign): {what}") from error
    absent = [key for key in KEYS if not isinstance(held, dict) or key not in held]
    if absent:
        raise ValueError(f"{path} is no training checkpoint: it holds no {', '.join(absent)}")
    return held
