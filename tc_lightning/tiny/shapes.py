"""The shapes world: one or two anti-aliased drawings on a plain background, sampled, split and drawn.

The combinations of a scene decide its split, so a held-out prompt shows a combination that the training prompts do not hold.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tc_lightning.tiny.captions import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing, read, write

CANVAS = 32  # pixels
RGB = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.98, 0.85, 0.10),
    "purple": (0.65, 0.10, 0.75),
    "cyan": (0.10, 0.80, 0.90),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.50, 0.50, 0.50),
    "black": (0.04, 0.04, 0.04),
}
CENTRES = {"left": (8.0, 16.0), "right": (24.0, 16.0), "top": (16.0, 8.0), "bottom": (16.0, 24.0), "centre": (16.0, 16.0)}
RADIUS = {"small": (3.6, 4.0), "large": (5.7, 6.2)}  # pixels, half of the drawing's extent
AREA = (3.1416, 3.24, 1.80, 2.2256)  # of each shape at radius 1, in the order of SHAPES
CENTROID_Y = (0.0, 0.0, 0.20, 0.0)  # centre of mass below the drawing's centre, in radii
SPLITS = ("train", "dev", "heldout")


def split_of(scene: Scene) -> str:
    """train (7 of 10), dev (1 of 10) or heldout (2 of 10), by a hash of which shapes meet in which colours.

    A single thing counts with its place; two things count as an unordered pair.
    """
    if len(scene.things) == 1:
        thing = scene.things[0]
        key = (f"{thing.colour} {thing.shape} {thing.place}",)
    else:
        key = tuple(sorted(f"{thing.colour} {thing.shape}" for thing in scene.things))
    bucket = hashlib.blake2b("|".join(key).encode(), digest_size=8).digest()[0] % 10
    return "dev" if bucket == 0 else "heldout" if bucket <= 2 else "train"


def sample_scene(rng: random.Random, split: str = "train", pair_fraction: float = 0.75) -> Scene:
    """A random scene of one split; `pair_fraction` of them show two things."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: accepted are {', '.join(SPLITS)}")
    while True:
        pair = rng.random() < pair_fraction
        places = rng.choice((("left", "right"), ("top", "bottom"))) if pair else (rng.choice(PLACES),)
        things = tuple(Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), place) for place in places)
        scene = Scene(rng.choice(BACKGROUNDS), things)
        alike = pair and (things[0].shape, things[0].colour) == (things[1].shape, things[1].colour)
        if not alike and split_of(scene) == split:
            return scene


def change_one_fact(scene: Scene, rng: random.Random) -> Scene:
    """The same scene with exactly one fact of one thing, or the background, changed to another value; its split stays."""
    while True:
        changed = _changed(scene, rng)
        if split_of(changed) == split_of(scene):
            return changed


def _changed(scene: Scene, rng: random.Random) -> Scene:
    which = rng.randrange(len(scene.things) * 3 + 1)
    if which == len(scene.things) * 3:
        return Scene(_other(BACKGROUNDS, scene.background, rng), scene.things)
    index, fact = divmod(which, 3)
    name, kind = (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))[fact]
    changed = Thing(**(vars(scene.things[index]) | {name: _other(kind, getattr(scene.things[index], name), rng)}))
    return Scene(scene.background, scene.things[:index] + (changed,) + scene.things[index + 1 :])


def _other(kind: Sequence[str], value: str, rng: random.Random) -> str:
    return rng.choice([candidate for candidate in kind if candidate != value])


def captions(count: int, seed: int, split: str = "train", forget: float = 0.0) -> list[str]:
    """`count` distinct captions of one split, a pure function of the arguments."""
    rng = random.Random(f"{split}-{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[write(sample_scene(rng, split), rng, forget)] = None
    return list(found)


def draw_caption(caption: str, seed: int) -> Tensor:
    """Image [3, 32, 32] in [0, 1] of what a caption states; what it leaves open is chosen by `seed`.

    Raises ValueError for a text that is no caption of the shapes world.
    """
    rng, scene = random.Random(f"caption-{seed}"), read(caption)
    places = [thing.place for thing in scene.things]
    if len(places) == 2 and None in places:
        opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
        known = next((place for place in places if place in opposite), None) or rng.choice(("left", "top"))
        places = [place or (opposite[known] if known in places else known) for place in places]
        places = [known, opposite[known]] if places[0] == places[1] else places
    chosen = [
        Thing(
            thing.shape or rng.choice(SHAPES),
            thing.colour or rng.choice(COLOURS),
            thing.size or rng.choice(SIZES),
            place or rng.choice(PLACES),
        )
        for thing, place in zip(scene.things, places, strict=True)
    ]
    return draw([Scene(scene.background or rng.choice(BACKGROUNDS), tuple(chosen))], seed)[0]


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline, negative inside; all arguments broadcast, `shape` indexes SHAPES."""
    ax, ay = x.abs(), y.abs()
    circle = torch.hypot(x, y) - radius
    square = torch.maximum(ax, ay) - 0.9 * radius
    slope = 1.8 / 2.0590  # |(1.8, 1.0)|: the sides run from the apex (0, -r) to (+-r, 0.8 r)
    side = ax * slope - (y + radius) * (1.0 / 2.0590)
    triangle = torch.maximum(side, y - 0.8 * radius)
    bar = 0.33 * radius
    cross = torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ay - radius, ax - bar))
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, cross)))


def coverage(shape: Tensor, centre_x: Tensor, centre_y: Tensor, radius: Tensor, canvas: int = CANVAS) -> Tensor:
    """Anti-aliased masks [N, canvas, canvas] in [0, 1] of N drawings given by four tensors [N]."""
    axis = torch.arange(canvas, dtype=radius.dtype) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    n = (-1, 1, 1)
    distance = signed_distance(shape.view(n), x - centre_x.view(n), y - centre_y.view(n), radius.view(n))
    return (0.5 - distance).clamp(0, 1)


def draw(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Images [B, 3, 32, 32] in [0, 1]; positions and sizes vary a little, as a pure function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    random_values = torch.rand(len(scenes), 2, 3, generator=generator)
    rows = []
    for scene in scenes:
        pad = scene.things + (None,) * (2 - len(scene.things))
        rows.append([_geometry(thing) for thing in pad])
    table = torch.tensor(rows)  # [B, 2, (shape, x, y, low, high, jitter_x, jitter_y, r, g, b)]
    shape, x, y, low, high, jx, jy = table[..., :7].unbind(-1)
    radius = low + (high - low) * random_values[..., 0]
    x = x + jx * (2 * random_values[..., 1] - 1)
    y = y + jy * (2 * random_values[..., 2] - 1)
    masks = coverage(*(value.flatten() for value in (shape, x, y, radius))).view(len(scenes), 2, 1, CANVAS, CANVAS)
    images = torch.tensor([RGB[scene.background] for scene in scenes])[..., None, None].expand(-1, 3, CANVAS, CANVAS)
    for index in range(2):
        alpha = masks[:, index] * (shape[:, index] >= 0)[:, None, None, None]
        images = images * (1 - alpha) + table[:, index, 7:, None, None] * alpha
    return images.contiguous()


def _geometry(thing: Thing | None) -> list[float]:
    if thing is None:
        return [-1.0] * 10
    x, y = CENTRES[thing.place]
    across = 3.0  # pixels of freedom along the free axis, half a pixel along the other
    jitter = {"left": (0.5, across), "right": (0.5, across), "top": (across, 0.5), "bottom": (across, 0.5)}
    return [float(SHAPES.index(thing.shape)), x, y, *RADIUS[thing.size], *jitter.get(thing.place, (1.5, 1.5)), *RGB[thing.colour]]
