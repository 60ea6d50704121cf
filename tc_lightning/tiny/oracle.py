"""What an image of the shapes world shows, read from its pixels alone; no learned part.

An image is taken apart (background, connected drawings, each matched against every shape's anti-aliased template) and
compared with the facts that its prompt states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from tc_lightning.tiny.captions import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, read
from tc_lightning.tiny.shapes import AREA, CANVAS, CENTROID_Y, RGB, coverage

BACKGROUND_TOLERANCE = 0.20  # RGB distance
COLOUR_TOLERANCE = 0.28  # RGB distance
FOREGROUND = 0.30  # RGB distance from the background at which a pixel belongs to a drawing
SPECK = 4  # pixels; smaller spots are ignored
MATCH = 0.75  # intersection over union with the best template; an eye reads drawings of 8 pixels down to about here
SIZE_LIMIT = 4.85  # pixels; radius between small and large
OFF_CENTRE = 4.0  # pixels


@dataclass(frozen=True)
class Reading:
    """What one image shows: `scene` is None when it is no clear drawing, and `reason` then says why."""

    scene: Scene | None
    reason: str = ""


def look(images: Tensor) -> list[Reading]:
    """Read images [B, 3, 32, 32] in [0, 1]; other sizes are area-averaged to 32 first."""
    if images.shape[-2:] != (CANVAS, CANVAS):
        images = torch.nn.functional.interpolate(images.float(), (CANVAS, CANVAS), mode="area")
    return [_look(image) for image in images.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).numpy()]


def _look(image: np.ndarray) -> Reading:
    ring = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    ground = np.median(ring, axis=0)
    distances = np.linalg.norm(_palette(BACKGROUNDS) - ground, axis=1)
    if distances.min() > BACKGROUND_TOLERANCE:
        return Reading(None, "no background")
    labels, count = ndimage.label(np.linalg.norm(image - ground, axis=-1) > FOREGROUND, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = [index + 1 for index, area in enumerate(areas) if area >= SPECK]
    if not 1 <= len(found) <= 2:
        return Reading(None, f"{len(found)} drawings")
    things = [_thing(image, ground, labels, index) for index in found]
    if None in things:
        return Reading(None, "unclear drawing")
    return Reading(Scene(BACKGROUNDS[int(distances.argmin())], tuple(things)))


def _palette(names: Sequence[str]) -> np.ndarray:
    return np.array([RGB[name] for name in names], dtype=np.float32)


def _thing(image: np.ndarray, ground: np.ndarray, labels: np.ndarray, index: int) -> Thing | None:
    own = labels == index
    inside = ndimage.binary_erosion(own)
    colour = np.median(image[inside if inside.sum() >= 4 else own], axis=0)
    distances = np.linalg.norm(_palette(COLOURS) - colour, axis=1)
    if distances.min() > COLOUR_TOLERANCE:
        return None
    axis = colour - ground
    near = ndimage.binary_dilation(own, np.ones((3, 3))) & ((labels == index) | (labels == 0))
    alpha = np.clip((image - ground) @ axis / (axis @ axis), 0, 1) * near
    area = alpha.sum()
    grid = np.arange(CANVAS, dtype=np.float32) + 0.5
    x, y = (alpha.sum(0) @ grid) / area, (alpha.sum(1) @ grid) / area
    radius = torch.sqrt(torch.tensor(float(area)) / torch.tensor(AREA))
    centre_y = y - torch.tensor(CENTROID_Y) * radius
    masks = coverage(torch.arange(len(SHAPES)), torch.full((4,), float(x)), centre_y, radius).numpy()
    match = np.minimum(masks, alpha).sum((1, 2)) / np.maximum(masks, alpha).sum((1, 2))
    best = int(match.argmax())
    if match[best] < MATCH:
        return None
    size = "large" if radius[best] > SIZE_LIMIT else "small"
    return Thing(SHAPES[best], COLOURS[int(distances.argmin())], size, _place(float(x), float(centre_y[best])))


def _place(x: float, y: float) -> str:
    dx, dy = x - CANVAS / 2, y - CANVAS / 2
    if max(abs(dx), abs(dy)) < OFF_CENTRE:
        return "centre"
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def agreement(shown: Scene | None, asked: Scene) -> float:
    """Share of the asked facts that the shown scene has, in [0, 1]; 1 is full (strict) obedience.

    0 where nothing clear is shown or more things than asked; a missing thing misses all its facts.
    """
    if shown is None or len(shown.things) > len(asked.things):
        return 0.0
    slots = list(shown.things) + [None] * (len(asked.things) - len(shown.things))
    hits = max(sum(map(_hits, order, asked.things)) for order in permutations(slots))
    hits += asked.background is not None and shown.background == asked.background
    return hits / asked.facts()


def _hits(shown: Thing | None, asked: Thing) -> int:
    if shown is None:
        return 0
    return sum(value is not None and getattr(shown, fact) == value for fact, value in vars(asked).items())


def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Agreement [B] in [0, 1] of images [B, 3, H, W] with captions of the shapes world."""
    readings = look(images)
    return torch.tensor([agreement(reading.scene, read(prompt)) for reading, prompt in zip(readings, prompts, strict=True)])


def failure(reading: Reading, asked: Scene) -> str:
    """ "" for full obedience, "decoding" where no clear scene is shown, else "alignment"."""
    if reading.scene is None:
        drawings = reading.reason.endswith("drawings") and not reading.reason.startswith("0")
        return "alignment" if drawings else "decoding"
    return "" if agreement(reading.scene, asked) == 1.0 else "alignment"
