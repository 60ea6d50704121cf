"""What the mixing page does, without the page: pictures of a prompt under mixtures, scores, a strip, a history, saved mixtures."""

from __future__ import annotations

import json
import math
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tc_lightning.backbone import Backbone
from tc_lightning.mixing import SPACES, Mixture, mixed_text_encoder, save_mixture, with_text_encoder
from tc_lightning.pixels import save_png
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.sampling import SCHEDULERS, Sampler

MAX_PROMPT = 2000  # characters
LIMITS = {"seed": (0, 2**32 - 1), "steps": (1, 150), "guidance_scale": (0.0, 30.0), "tuned_fraction": (0.0, 1.0)}
WEIGHT_LIMITS = (-2.0, 3.0)
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a strip

Say = Callable[[float, str], None]  # share that is done, what is being done


@dataclass(frozen=True)
class Trial:
    """One thing to try.

    Args:
        prompt: a text, up to MAX_PROMPT characters.
        weights: of the tuned text encoders, in order; the original has the rest to one.
        space: "embedding" or "weights", see mixing.
    """

    prompt: str
    weights: tuple[float, ...]
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str = "ddim"
    tuned_fraction: float = 1.0
    space: str = "embedding"

    @property
    def all_weights(self) -> tuple[float, ...]:
        """The original's weight first, then the tuned ones': they sum to one."""
        return (round(1.0 - math.fsum(self.weights), 9), *self.weights)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image [3, H, W] in [0, 1] with what made it and its scores by name."""

    label: str
    image: Tensor
    scores: dict[str, float]


@dataclass
class Playground:
    """A model with tuned text encoders to mix.

    Args:
        backbone: the original model.
        tuned: tuned text encoders by name.
        folder: everything is written into it: pictures/, encoders/, history.jsonl.
        rewards: scores to show, or None.
        chain: steps, guidance_scale, timestep_spacing and tuned_fraction to begin with.
        sources: what the tuned text encoders are as `run=`, for the command that repeats a picture.
        base: what the original is as `base=`, where it was given.
        record: what a saved mixture's run.json also says (versions, commit).
    """

    backbone: Backbone
    tuned: Mapping[str, nn.Module]
    folder: Path
    rewards: RewardMix | None = None
    chain: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()
    base: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.history: list[tuple[Trial, list[Picture]]] = []
        self._lock = threading.Lock()  # one picture at a time: the model is one

    @property
    def names(self) -> list[str]:
        """Of the tuned text encoders."""
        return list(self.tuned)

    def first_trial(self, prompt: str = "") -> Trial:
        """What the page opens with: an even mixture of the original and all."""
        share = round(round(20 / (len(self.tuned) + 1)) / 20, 2)  # where a slider of steps of .05 can stand
        known = {name: self.chain[name] for name in ("steps", "guidance_scale", "tuned_fraction") if name in self.chain}
        return Trial(prompt, (share,) * len(self.tuned), **known)

    def check(self, trial: Trial) -> Trial:
        """The same trial with numbers as numbers.

        Raises:
            ValueError: says which setting is wrong and what is accepted; fit to be shown to whoever set it.
        """
        if not isinstance(trial.prompt, str) or not trial.prompt.strip():
            raise ValueError("The prompt is empty: write what the picture is to show.")
        if len(trial.prompt) > MAX_PROMPT:
            raise ValueError(f"The prompt has {len(trial.prompt)} characters, accepted: up to {MAX_PROMPT}.")
        for name, accepted in (("scheduler", tuple(SCHEDULERS)), ("space", SPACES)):
            if getattr(trial, name) not in accepted:
                raise ValueError(f"{name} is {getattr(trial, name)!r}, accepted: {', '.join(accepted)}.")
        found = {name: _number(name, getattr(trial, name), *limits) for name, limits in LIMITS.items()}
        found |= {name: int(found[name]) for name in ("seed", "steps")}
        if len(trial.weights) != len(self.tuned):
            raise ValueError(f"{len(trial.weights)} weights for {len(self.tuned)} text encoders.")
        weights = tuple(_number(name, w, *WEIGHT_LIMITS) for name, w in zip(self.tuned, trial.weights, strict=True))
        return replace(trial, prompt=trial.prompt.strip(), weights=weights, **found)

    def note(self, trial: Trial) -> str:
        """What whoever set this should know; empty if nothing."""
        notes, limit = [], self.backbone.tokenizer.model_max_length
        count = self.backbone.token_counts([trial.prompt])[0]
        if count > limit:
            notes.append(f"The prompt has {count} tokens, the model reads the first {limit}.")
        if trial.all_weights[0] < 0:
            notes.append(f"The weights exceed one: the original is subtracted ({trial.all_weights[0]:g}).")
        return " ".join(notes)

    def compare(self, trial: Trial, alone: bool = False, say: Say = lambda done, what: None) -> list[Picture]:
        """Pictures of the original and of the mixture, with `alone` also of each tuned text encoder by itself; kept in history.

        Raises:
            ValueError: as `check`.
        """
        trial, count = self.check(trial), len(self.tuned)
        sets = {"original": (0.0,) * count, "mixture": trial.weights}
        if alone:
            sets |= {name: tuple(float(row == one) for row in range(count)) for one, name in enumerate(self.tuned)}
        with self._lock:
            made = self._sample({label: replace(trial, weights=weights) for label, weights in sets.items()}, say)
            self._remember(trial, made)
        return made

    def strip(self, trial: Trial, name: str, say: Say = lambda done, what: None) -> list[Picture]:
        """Pictures with the weight of one text encoder at 0, .25, .5, .75, 1, the others as they are set.

        Raises:
            ValueError: as `check`, or an unknown name.
        """
        if name not in self.tuned:
            raise ValueError(f"No text encoder {name!r}: accepted are {', '.join(self.tuned)}.")
        trial, place = self.check(trial), self.names.index(name)
        trials = {}
        for point in POINTS:
            weights = (*trial.weights[:place], point, *trial.weights[place + 1 :])
            trials[f"{point:g} {name}"] = replace(trial, weights=weights)
        with self._lock:
            return self._sample(trials, say)

    def save(self, trial: Trial, name: str) -> Path:
        """Keep the mixture as one text encoder (mixed in weight space) under folder/encoders; the folder is a run to every verb.

        Raises:
            ValueError: as `check`; no usable name, or a name that is taken.
        """
        trial = self.check(replace(trial, prompt=trial.prompt or "-"))
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", str(name)).strip("-")[:60]
        if not slug:
            raise ValueError("Give the mixture a name of letters and digits.")
        place = self.folder / "encoders" / slug
        if place.exists():
            raise ValueError(f"{slug} exists already: choose another name.")
        sampling = {"steps": trial.steps, "guidance_scale": trial.guidance_scale}
        chain = {**sampling, "timestep_spacing": self.chain.get("timestep_spacing", "trailing")}
        record = {**self.record, "run": list(self.sources), "tuned_fraction": trial.tuned_fraction, "config": {"chain": chain}}
        with self._lock:
            return save_mixture(place, self.backbone, self.tuned, Mixture.of(trial.all_weights, self.names), record)

    def settings(self, trial: Trial) -> dict[str, Any]:
        """A trial as plain data, with the command that makes the mixture's picture again."""
        weights = dict(zip(("original", *self.names), trial.all_weights, strict=True))
        return {**asdict(trial), "weights": weights, "run": list(self.sources), "command": self.command(trial)}

    def command(self, trial: Trial) -> str:
        """The verb that makes the mixture's picture, bit for bit."""
        words = [f"run=[{','.join(self.sources)}]"] + ([f"base={self.base}"] if self.base else [])
        words += [f"weights={json.dumps(list(trial.all_weights))}", f"text={json.dumps([trial.prompt], ensure_ascii=False)}"]
        words += [f"seeds=[{trial.seed}]", f"chain.steps={trial.steps}", f"chain.guidance_scale={trial.guidance_scale}"]
        words += [f"chain.scheduler={trial.scheduler}", f"tuned_fraction={trial.tuned_fraction}", f"space={trial.space}"]
        return shlex.join(["python", "-m", "tc_lightning", "mix", *words])

    def _sample(self, trials: Mapping[str, Trial], say: Say) -> list[Picture]:
        made = []
        for number, (label, trial) in enumerate(trials.items()):

            def on_step(step: int, number: int = number, label: str = label, of: int = trial.steps) -> None:
                say((number + min(step / of, 1.0)) / len(trials), f"{label}, step {step + 1} of {of}")

            encoder = mixed_text_encoder(self.backbone.text_encoder, self.tuned, trial.all_weights, trial.space)
            sampling = {name: getattr(trial, name) for name in ("steps", "guidance_scale", "tuned_fraction", "scheduler")}
            spacing = self.chain.get("timestep_spacing", "trailing")
            original = self.backbone.text_encoder
            whole = with_text_encoder(self.backbone, encoder)
            sampler = Sampler(whole, **sampling, timestep_spacing=spacing, original=original, on_step=on_step)
            image = sampler([trial.prompt], [trial.seed])
            made.append(Picture(label, image[0], self._score(image, trial.prompt)))
        return made

    @torch.no_grad()
    def _score(self, image: Tensor, prompt: str) -> dict[str, float]:
        if self.rewards is None:
            return {}
        return {name: float(value) for name, value in self.rewards(image.to(self.backbone.device), [prompt])[1].items()}

    def _remember(self, trial: Trial, made: list[Picture]) -> None:
        if self.history and self.history[-1][0] == trial and len(self.history[-1][1]) == len(made):
            return
        number = len(self.history)
        self.history.append((trial, made))
        files = [f"{number:04d}_{column}" for column in range(len(made))]
        save_png(torch.stack([picture.image for picture in made]), self.folder / "pictures", files)
        line = {"number": number, "settings": self.settings(trial), "scores": {p.label: p.scores for p in made}}
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _number(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name} is {value}, accepted: {low:g} to {high:g}.")
    return number
