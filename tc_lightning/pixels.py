"""Images as tensors [B, 3, H, W] in [0, 1]: differentiable resizing and normalising, PNG files, picture grids."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZE_MODES = ("bicubic", "bilinear", "average")


def resize(images: Tensor, size: int | tuple[int, int], mode: str = "bicubic", clamp: bool = True) -> Tensor:
    """Images [B, 3, h, w] in fp32 (fp64 stays), antialiased and differentiable; `size` is (h, w), or one number for a square.

    bicubic and bilinear are PIL's filters of those names, which the published scorers were trained with; average is
    adaptive average pooling, the resize of TextCraftor's published code.

    Always computed in fp32: the antialiased kernel has no half-precision form on the CPU, and autocast leaves it alone.
    Bicubic overshoots [0, 1] at sharp edges, where PIL clips to the range of a byte. `clamp` does the same: the value
    stays a picture, and the gradient is zero on the overshooting pixels and untouched on all others. Raises ValueError
    for an unknown mode.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"mode={mode!r}, accepted: {', '.join(RESIZE_MODES)}")
    size = (size, size) if isinstance(size, int) else tuple(size)
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    with torch.autocast(images.device.type, enabled=False):
        if mode == "average":
            return F.adaptive_avg_pool2d(images, size)
        resized = F.interpolate(images, size, mode=mode, antialias=True, align_corners=False)
        return resized.clamp(0.0, 1.0) if clamp else resized


def resize_short_side(images: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Images whose short side is `size` pixels, aspect kept, the long side rounded down (CLIP's preprocessing)."""
    height, width = images.shape[-2:]
    short = min(height, width)
    return resize(images, (size * height // short, size * width // short), mode)


def resize_longest_side_and_pad(
    images: Tensor, size: int, pad_value: float = 0.0, mode: str = "bicubic", clamp: bool = True
) -> Tensor:
    """Squares [B, 3, size, size]: the long side is `size` pixels, the rest is `pad_value` (in [0, 1]) on both sides.

    The preprocessing of the hpsv2 package, which resizes floating-point pixels and so keeps the overshoot (`clamp=False`);
    on square images it is the same as resize.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)  # the product is rounded, as there: round(height * size / longest) can differ by one
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    down, across = size - new_height, size - new_width
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(resize(images, (new_height, new_width), mode, clamp), margins, value=pad_value)


def center_crop(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The middle [B, 3, h, w] of images; an odd margin is smaller above and left. ValueError if they are too small."""
    height, width = (size, size) if isinstance(size, int) else size
    top, left = images.shape[-2] - height, images.shape[-1] - width
    if min(top, left) < 0:
        raise ValueError(f"crop of {height}x{width}, accepted: up to the images' size, {tuple(images.shape[-2:])}")
    return images[..., top // 2 : top // 2 + height, left // 2 : left // 2 + width]


def normalize(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std per channel, [B, 3, H, W] in the images' dtype; OpenAI CLIP's constants by default."""
    mean, std = (torch.tensor(value, dtype=images.dtype, device=images.device).view(-1, 1, 1) for value in (mean, std))
    return (images - mean) / std


def to_uint8(images: Tensor) -> np.ndarray:
    """Bytes [B, H, W, 3] from images [B, 3, H, W] in [0, 1]; values outside are clipped, halves go to the even byte."""
    pixels = images.detach().float().clamp(0.0, 1.0).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def save_png(images: Tensor, folder: str | os.PathLike, names: Sequence[str]) -> list[Path]:
    """Write images [B, 3, H, W] in [0, 1] as folder/name.png and return the paths.

    A name may hold a subfolder ("anime/00001"); folders are made. Raises ValueError unless there is one name per image.
    """
    if len(names) != len(images):
        raise ValueError(f"{len(names)} names for {len(images)} images, accepted: one name an image")
    paths = [Path(folder) / f"{name.removesuffix('.png')}.png" for name in names]
    for path, pixels in zip(paths, to_uint8(images), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return paths


def load_png(path: str | os.PathLike) -> Tensor:
    """A picture file as fp32 [3, H, W] in [0, 1]."""
    with Image.open(path) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def grid(
    rows: Tensor,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell_labels: Sequence[Sequence[str]] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """One picture of R x C images on white, from `rows` [R, C, 3, H, W] in [0, 1].

    Row labels (R) stand wrapped in a column at the left, column labels (C) above, cell labels (R lists of C) below
    their image; a row is as high as its longest text. `scale` enlarges each pixel to a square of that many; by default
    the images become at least 160 pixels wide. Raises ValueError for labels that do not match R and C, and for
    scale < 1.
    """
    count, columns, _, height, width = rows.shape
    scale = math.ceil(160 / width) if scale is None else scale
    _check_grid(count, columns, row_labels, column_labels, cell_labels, scale)
    height, width = height * scale, width * scale
    font = ImageFont.load_default(size=min(24, max(14, width // 14)))
    margin, line = 12, sum(font.getmetrics()) + 2

    row_texts = [_wrap(label, font, max(180, width)) for label in row_labels or [""] * count]
    column_texts = [_wrap(label, font, width) for label in column_labels or [""] * columns]
    cell_texts = [[_wrap(label, font, width) for label in row] for row in cell_labels or [[""] * columns] * count]
    left = margin + (max(180, width) + margin if row_labels else 0)
    top = margin + max(map(len, column_texts)) * line
    row_heights = [
        max(height + max(map(len, cells)) * line + margin, len(text) * line + margin)
        for text, cells in zip(row_texts, cell_texts, strict=True)
    ]

    sheet = Image.new("RGB", (left + columns * (width + margin), top + sum(row_heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, text in enumerate(column_texts):
        _write(draw, text, left + c * (width + margin), top - len(text) * line, line, font)
    for r in range(count):
        _write(draw, row_texts[r], margin, top, line, font)
        for c, pixels in enumerate(to_uint8(rows[r])):
            x = left + c * (width + margin)
            sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, top))
            _write(draw, cell_texts[r][c], x, top + height + 2, line, font)
        top += row_heights[r]
    return sheet


def _check_grid(count: int, columns: int, row_labels, column_labels, cell_labels, scale: int) -> None:
    if scale < 1:
        raise ValueError(f"scale={scale}, accepted: 1 or more")
    for name, labels, wanted in (("row", row_labels, count), ("column", column_labels, columns)):
        if labels is not None and len(labels) != wanted:
            raise ValueError(f"{len(labels)} {name}_labels, accepted: {wanted}, one a {name}")
    if cell_labels is not None and [len(row) for row in cell_labels] != [columns] * count:
        lengths = [len(row) for row in cell_labels]
        raise ValueError(f"cell_labels of lengths {lengths}, accepted: {count} lists of {columns}")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels; a line break stays, a word longer than a line is cut."""
    return [line for paragraph in text.splitlines() for line in _wrap_line(paragraph, font, width)]


def _wrap_line(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line] if line else lines


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, line_height: int, font) -> None:
    for index, text in enumerate(lines):
        draw.text((x, y + index * line_height), text, fill="black", font=font)
