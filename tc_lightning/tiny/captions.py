"""The language of the shapes world: scenes to captions in many words, and captions back to scenes.

A caption states some or all of a scene's facts. `read` recovers exactly the facts that `write` stated, so that an
image can be judged against its prompt without any learned part (oracle.py).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS = ("white", "gray", "black")

SYNONYMS = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "on the bottom"),
    "centre": ("in the centre", "in the middle"),
}
MEANING = {word: fact for fact, words in SYNONYMS.items() for word in words} | {c: c for c in COLOURS}
RELATIONS = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
BACKGROUND = re.compile(rf"(?:\bon an?\s|\bagainst an?\s)?\b({'|'.join(BACKGROUNDS)}|grey) background\b")
RELATION = re.compile(rf"\b(?:to the )?({'|'.join(RELATIONS)})\b")
JOIN = re.compile(r",|\band\b|\bwith\b|\bbeside\b")


@dataclass(frozen=True)
class Thing:
    """One drawn object. A fact that is None is not stated (only in scenes read from captions)."""

    shape: str | None
    colour: str | None
    size: str | None
    place: str | None


@dataclass(frozen=True)
class Scene:
    """One or two things on a background."""

    background: str | None
    things: tuple[Thing, ...]

    def facts(self) -> int:
        """Number of stated facts."""
        stated = [self.background, *(value for thing in self.things for value in vars(thing).values())]
        return sum(value is not None for value in stated)


def write(scene: Scene, rng: random.Random, forget: float = 0.0) -> str:
    """A caption of `scene`; each size, place, colour and the background is left out with probability `forget`."""
    things = list(scene.things)
    rng.shuffle(things)
    relation = _relation(things) if rng.random() < 0.25 else None
    said = " ".join(_phrase(things[0], rng, forget, place=relation is None))
    if len(things) == 2:
        second = " ".join(_phrase(things[1], rng, forget, place=relation is None))
        said += f" {relation} {second}" if relation else rng.choice((" and ", ", ", " beside ", " with ")) + second
    if scene.background is None or rng.random() < forget:
        return said
    ground = f"{scene.background} background"
    return rng.choice((f"{said}, {ground}", f"{said} on a {ground}", f"{ground}, {said}", f"{said} against a {ground}"))


def _relation(things: list[Thing]) -> str | None:
    places = tuple(thing.place for thing in things)
    return next((f"to the {name}" if "of" in name else name for name, pair in RELATIONS.items() if pair == places), None)


def _phrase(thing: Thing, rng: random.Random, forget: float, place: bool) -> list[str]:
    size = [rng.choice(SYNONYMS[thing.size])] if rng.random() >= forget else []
    colour = [thing.colour] if rng.random() >= 0.3 * forget else []
    where = [rng.choice(SYNONYMS[thing.place])] if place and rng.random() >= forget else []
    what = ["a", *size, *colour, rng.choice(SYNONYMS[thing.shape])]
    return [*what, *where] if rng.random() < 0.7 else [*where, *what]


def read(caption: str) -> Scene:
    """The facts that a caption states.

    Raises:
        ValueError: the caption names no shape, or more than two things.
    """
    text = " ".join(caption.lower().split())
    ground = BACKGROUND.search(text)
    text = BACKGROUND.sub(" ", text)
    relation = RELATION.search(text)
    parts = [text[: relation.start()], text[relation.end() :]] if relation else JOIN.split(text)
    places = RELATIONS[relation.group(1)] if relation else (None,) * len(parts)
    read_things = (_read_thing(part, place) for part, place in zip(parts, places, strict=True))
    things = tuple(thing for thing in read_things if thing.shape is not None)
    if not 1 <= len(things) <= 2:
        raise ValueError(f"not a caption of the shapes world (one or two of {', '.join(SHAPES)}): {caption!r}")
    background = ground.group(1).replace("grey", "gray") if ground else None
    return Scene(background, things)


def _read_thing(phrase: str, place: str | None) -> Thing:
    facts = {fact for words, fact in MEANING.items() if re.search(rf"\b{words}\b", phrase)}

    def of(kind: tuple[str, ...]) -> str | None:
        return next((fact for fact in kind if fact in facts), None)

    return Thing(of(SHAPES), of(COLOURS), of(SIZES), place or of(PLACES))
