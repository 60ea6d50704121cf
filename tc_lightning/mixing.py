"""Interpolation and style mixing of text encoders, in embedding space or in weight space (TextCraftor Figs. 4 and 5)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tc_lightning import conditioning
from tc_lightning.backbone import Backbone, save_model
from tc_lightning.pixels import grid
from tc_lightning.sampling import generate

SPACES = ("embedding", "weights")
ORIGINAL = "original"


@dataclass(frozen=True)
class Mixture:
    """Weights over text encoders by name, the original first; they sum to one.

    A weight may be negative or above one (extrapolation).
    """

    weights: tuple[float, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, weights: Sequence[float], names: Sequence[str], normalize: bool = False) -> Mixture:
        """Checked weights, one for the original and one for each tuned text encoder.

        Args:
            weights: numbers that sum to one within 1e-6.
            names: of the tuned text encoders, the original left out.
            normalize: divide by the sum instead.

        Raises:
            ValueError: another number of weights than of text encoders, a sum that is not one, or no finite number.
        """
        weights, known = tuple(float(weight) for weight in weights), (ORIGINAL, *names)
        if len(weights) != len(known):
            raise ValueError(
                f"{len(weights)} weights {list(weights)} for {len(known)} text encoders: one each for {', '.join(known)}"
            )
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"weights {list(weights)}: accepted are finite numbers")
        total = math.fsum(weights)
        if normalize and abs(total) > 1e-9:
            weights, total = tuple(weight / total for weight in weights), 1.0
        if abs(total - 1) > 1e-6:
            hint = "normalize=true divides by the sum" if abs(total) > 1e-9 else "they cannot be rescaled"
            raise ValueError(f"weights {list(weights)} sum to {total:g}, accepted: 1 within 1e-6; {hint}")
        return cls(weights, known)

    @property
    def label(self) -> str:
        """The weights that are not zero, with names."""
        return ", ".join(f"{weight:g} {name}" for weight, name in zip(self.weights, self.names, strict=True) if weight)


def interpolation(count: int = 1) -> list[list[float]]:
    """Weight sets of Fig. 4: (1 - w) original + w tuned for w = 0, .25, .5, .75, 1. ValueError unless count is 1."""
    if count != 1:
        raise ValueError(f"figure_4 goes from the original to one tuned text encoder, not {count}: preset=figure_5 mixes several")
    return [[1 - w, w] for w in (0.0, 0.25, 0.5, 0.75, 1.0)]


def styles(count: int = 3) -> list[list[float]]:
    """Weight sets of Fig. 5: the original, an even mix, and each tuned text encoder in front in turn.

    With three tuned text encoders [1, 0, 0, 0], [.1, .3, .3, .3], [.1, .7, .1, .1] and so on, as published; with another
    number the original keeps .1, the one in front has .7 and the others share .2. ValueError for fewer than two.
    """
    if count < 2:
        raise ValueError(f"figure_5 mixes two or more tuned text encoders, not {count}: preset=figure_4 takes one")
    even, rest = round(0.9 / count, 9), round(0.2 / (count - 1), 9)
    sets = [[1.0] + [0.0] * count, [0.1] + [even] * count]
    return sets + [[0.1] + [0.7 if other == one else rest for other in range(count)] for one in range(count)]


PRESETS: dict[str, Callable[[int], list[list[float]]]] = {"figure_4": interpolation, "figure_5": styles}


class MixedTextEncoder(nn.Module):
    """Text encoders that speak as one: the weighted sum of their prompt_embeds, wherever a text encoder is accepted.

    Encoders of weight zero are not asked, so [1, 0] is the first one bit for bit.

    Args:
        text_encoders: of one width and length.
        weights: one a text encoder.
    """

    def __init__(self, text_encoders: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        chosen = [(encoder, weight) for encoder, weight in zip(text_encoders, weights, strict=True) if weight != 0]
        self.text_encoders = nn.ModuleList([encoder for encoder, _ in chosen])
        self.weights = [weight for _, weight in chosen]

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """An output with `last_hidden_state` [B, L, D] for input_ids [B, L]."""
        embeds = [encoder(input_ids).last_hidden_state for encoder in self.text_encoders]
        return SimpleNamespace(last_hidden_state=embeds[0] if self.weights == [1.0] else conditioning.mix(embeds, self.weights))


def merge(text_encoders: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """One text encoder whose weights are the weighted sum of theirs, which can be saved and exported.

    The sum is taken in fp64 and kept in the first one's dtype; [1, 0] is the first one bit for bit.

    Raises:
        ValueError: parameters of different names or shapes.
    """
    merged = copy.deepcopy(text_encoders[0])
    states = [encoder.state_dict() for encoder in text_encoders]
    with torch.no_grad():
        for key, value in merged.state_dict().items():
            parts = [state[key].to(value.device) for state in states]
            if value.is_floating_point():
                value.copy_(sum(weight * part.double() for weight, part in zip(weights, parts, strict=True) if weight))
    return merged


def check_alike(text_encoders: Mapping[str, nn.Module]) -> None:
    """Refuse text encoders that cannot be mixed.

    Raises:
        ValueError: names the two encoders and the first parameter that differs.
    """
    (first, one), *others = text_encoders.items()
    mine = {key: tuple(value.shape) for key, value in one.state_dict().items()}
    for name, encoder in others:
        theirs = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
        odd = next((key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)), None)
        if odd is not None:
            raise ValueError(f"{name} and {first} do not mix: {odd} is {theirs.get(odd)} in {name} and {mine.get(odd)} in {first}")


def mixed_text_encoder(
    original: nn.Module, tuned: Mapping[str, nn.Module], weights: Sequence[float], space: str = "embedding", normalize: bool = False
) -> nn.Module:
    """One text encoder of the original and tuned ones by name, mixed in embedding or in weight space.

    Raises:
        ValueError: weights that do not fit, an unknown space, or text encoders of different shapes.
    """
    if space not in SPACES:
        raise ValueError(f"space={space!r}, accepted: {', '.join(SPACES)}")
    check_alike({ORIGINAL: original, **tuned})
    mixture = Mixture.of(weights, list(tuned), normalize)
    encoders = [original, *tuned.values()]
    made = MixedTextEncoder(encoders, mixture.weights) if space == "embedding" else merge(encoders, mixture.weights)
    return made.requires_grad_(False).eval()


def mix(
    backbone: Backbone,
    tuned: Mapping[str, nn.Module],
    prompts: Sequence[str],
    weights: Sequence[float],
    seeds: Sequence[int] = (0,),
    space: str = "embedding",
    normalize: bool = False,
    tuned_fraction: float = 1.0,
    **sampling: Any,
) -> Tensor:
    """Images [P * S, 3, H, W] in [0, 1] on the CPU of a mixture of text encoders, every prompt with every seed.

    Args:
        backbone: the original model; its text encoder is the original.
        tuned: tuned text encoders by name.
        weights: one for the original and one for each tuned text encoder, in order; they sum to one.
        space: "embedding" mixes what the encoders say, as the paper does; "weights" mixes the encoders themselves.
        normalize: divide the weights by their sum.
        tuned_fraction: the mixture is used where t < 1000 * tuned_fraction, the original before.
        sampling: further arguments of `generate` (steps, guidance_scale, ...).

    Example:
        >>> images = mix(backbone, {"bold": encoder}, ["a red circle"], weights=[0.5, 0.5])  # doctest: +SKIP
    """
    original = backbone.text_encoder
    encoder = mixed_text_encoder(original, tuned, weights, space, normalize)
    whole = with_text_encoder(backbone, encoder)
    return generate(whole, prompts, seeds, tuned_fraction=tuned_fraction, original=original, **sampling)


def with_text_encoder(backbone: Backbone, text_encoder: nn.Module) -> Backbone:
    """The same model with another text encoder; the other parts are shared, not copied, and frozen."""
    return Backbone(backbone.tokenizer, text_encoder, backbone.vae, backbone.unet, backbone.noise_scheduler, dict(backbone.source))


def save_mixture(
    folder: str | Path, backbone: Backbone, tuned: Mapping[str, nn.Module], mixture: Mixture, record: Mapping[str, Any]
) -> Path:
    """Write a mixture in weight space as a folder that is a run to every verb: text_encoder/, then run.json.

    Args:
        backbone: the original model, named in the record as the base.
        record: what else run.json is to say (tuned_fraction, config with the chain).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(merge([backbone.text_encoder, *tuned.values()], mixture.weights), folder / "text_encoder")
    mixtures = [dict(zip(mixture.names, mixture.weights, strict=True))]
    card = {**record, "verb": "mix", "status": "finished", "space": "weights", "mixtures": mixtures, "backbone": backbone.source}
    (folder / "run.json").write_text(json.dumps(card, indent=1, default=str) + "\n", encoding="utf-8")
    return folder


def strip(images: Tensor, mixtures: Sequence[Mixture], row_labels: Sequence[str] | None = None) -> Image.Image:
    """One picture of images [M, R, 3, H, W] in [0, 1], a column a mixture with its weights under each picture."""
    rows = images.transpose(0, 1)
    labels = [mixture.label for mixture in mixtures]
    return grid(rows, row_labels=row_labels, cell_labels=[labels] * len(rows))
