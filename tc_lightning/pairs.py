"""Images with captions, for direct fine-tuning: a folder, WebDataset tars, a hub data set, or drawings of the shapes world.

A source is a `Pairs`: captions, and a function (index, pixels) -> image [3, pixels, pixels] in [0, 1]. Images are cut to
their central square and resized with antialiasing. What an image file or a tar says is never trusted: only members that
are plain files of known kinds are read, in memory, up to a size limit; nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tc_lightning.noise import derive_seed
from tc_lightning.tiny.shapes import draw_caption

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
MAX_BYTES = 64 * 2**20  # of one image file
MAX_PIXELS = 64 * 10**6  # of one decoded image


@dataclass(frozen=True)
class Pairs:
    """Captions and their images.

    Args:
        captions: one an image.
        load: (index, pixels) -> [3, pixels, pixels] in [0, 1]; plain data or a function of a module, for workers copy it.
    """

    captions: list[str]
    load: Callable[[int, int], Tensor]


def folder_pairs(path: str | Path, limit: int | None = None) -> Pairs:
    """Images of a folder and its subfolders, each with a caption file of the same name beside it (`a.png`, `a.txt`).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image with a caption, or a caption that is not UTF-8.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder {root}: prompts.path=<folder of images, each with a .txt caption beside it>")
    files = [file for file in sorted(root.rglob("*")) if file.suffix.lower() in IMAGES and file.is_file()]
    found = [(file, file.with_suffix(".txt")) for file in files]
    found = [(file, text) for file, text in found if text.is_file()][:limit]
    if not found:
        raise ValueError(f"{root} holds {len(files)} images ({', '.join(IMAGES)}) and none with a .txt caption beside it")
    captions = [_caption(text.read_bytes(), text) for _, text in found]
    return Pairs(captions, _Files([file for file, _ in found]))


def webdataset_pairs(path: str | Path | Sequence[str | Path], limit: int | None = None) -> Pairs:
    """Images of WebDataset tars: members `<key>.jpg` (or .png, .webp) with `<key>.txt`, or `<key>.json` with "caption".

    Args:
        path: a tar, a folder of tars, or a list of tars. They are indexed once, read in place, and never unpacked.

    Raises:
        FileNotFoundError: no tar there.
        ValueError: not a tar, compressed, cut short, or without a captioned image.
    """
    given = [Path(one) for one in ([path] if isinstance(path, str | Path) else path)]
    tars = [tar for one in given for tar in (sorted(one.glob("*.tar")) if one.is_dir() else [one])]
    if not tars or not all(tar.is_file() for tar in tars):
        raise FileNotFoundError(f"no tar at {', '.join(map(str, given))}: prompts.path=<a .tar, or a folder of them>")
    places, captions = [], []
    for tar in tars:
        for caption, place in _index(tar):
            captions.append(caption)
            places.append(place)
    if not captions:
        raise ValueError(f"{tars[0]} and {len(tars) - 1} others hold no image with a caption (<key>.jpg with <key>.txt or .json)")
    return Pairs(captions[:limit], _Members(places[:limit]))


def hub_pairs(
    name: str, split: str = "train", image: str = "image", caption: str = "text", limit: int | None = None, **options: Any
) -> Pairs:
    """Images of a data set of the hub, or of a folder that `datasets.load_dataset` reads; needs the extra `data`.

    Args:
        name, split, options: as `datasets.load_dataset` takes them.
        image, caption: its columns.

    Raises:
        ValueError: datasets is not installed, or a column that the set does not have.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError("prompts=hub_images needs datasets: pip install 'tc_lightning[data]'") from error
    table = datasets.load_dataset(name, split=split, **options)
    for column in (image, caption):
        if column not in table.column_names:
            raise ValueError(f"{name} has no column {column!r}: it has {', '.join(table.column_names)}")
    table = table if limit is None else table.select(range(min(limit, len(table))))
    return Pairs([str(text) for text in table[caption]], _Rows(table, image))


def drawn_pairs(captions: Sequence[str], seed: int = 0) -> Pairs:
    """Drawings of captions of the shapes world, exact; facts that a caption leaves open are drawn at random, once."""
    return Pairs(list(captions), _Drawings(list(captions), seed))


@dataclass(frozen=True)
class _Files:
    files: list[Path]

    def __call__(self, index: int, pixels: int) -> Tensor:
        return read_image(self.files[index].read_bytes(), pixels, str(self.files[index]))


@dataclass(frozen=True)
class _Members:
    places: list[tuple[Path, str, int, int]]

    def __call__(self, index: int, pixels: int) -> Tensor:
        tar, name, offset, size = self.places[index]
        with tar.open("rb") as file:
            file.seek(offset)
            return read_image(file.read(size), pixels, f"{tar}: {name}")


@dataclass(frozen=True)
class _Rows:
    table: Any
    column: str

    def __call__(self, index: int, pixels: int) -> Tensor:
        return to_square(self.table[index][self.column], pixels)


@dataclass(frozen=True)
class _Drawings:
    captions: list[str]
    seed: int

    def __call__(self, index: int, pixels: int) -> Tensor:
        image = draw_caption(self.captions[index], derive_seed(self.seed, 17, index))
        if pixels == image.shape[-1]:
            return image
        return torch.nn.functional.interpolate(image[None], (pixels, pixels), mode="bicubic", antialias=True)[0].clamp(0, 1)


def read_image(data: bytes, pixels: int, name: str) -> Tensor:
    """Image [3, pixels, pixels] in [0, 1] of a file's bytes.

    Raises:
        ValueError: too large, of another kind, or cut short; names the file.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name} has {len(data)} bytes, accepted: at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{name} has {image.width} x {image.height} pixels, accepted: at most {MAX_PIXELS}")
                return to_square(image, pixels)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"could not read the image {name}: {error}") from error


def to_square(image: Image.Image, pixels: int) -> Tensor:
    """[3, pixels, pixels] in [0, 1] of a picture's central square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    small = image.convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


def _caption(data: bytes, place: object) -> str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 (byte {error.start})") from error
    if not text:
        raise ValueError(f"{place} is an empty caption")
    return " ".join(text.split())


def _index(tar: Path) -> list[tuple[str, tuple[Path, str, int, int]]]:
    """Caption and place of every captioned image of a tar; only plain files are looked at, and read in place."""
    images: dict[str, tuple[Path, str, int, int]] = {}
    captions: dict[str, str] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, dot, kind = member.name.rpartition(".")
                if not member.isfile() or not dot or member.size > MAX_BYTES:
                    continue
                if f".{kind.lower()}" in IMAGES:
                    images[key] = (tar, member.name, member.offset_data, member.size)
                elif kind in ("txt", "json"):
                    data = archive.extractfile(member).read()
                    text = data if kind == "txt" else _of_json(data, f"{tar}: {member.name}")
                    if text is not None and (kind == "txt" or key not in captions):
                        captions[key] = _caption(text, f"{tar}: {member.name}")
    except tarfile.TarError as error:
        raise ValueError(f"could not read {tar} as an uncompressed tar: {error}") from error
    return [(captions[key], place) for key, place in images.items() if key in captions]


def _of_json(data: bytes, place: str) -> bytes | None:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    caption = found.get("caption") if isinstance(found, dict) else None
    return caption.encode() if isinstance(caption, str) and caption.strip() else None
