"""Scores of images as a table: csv, means with intervals, paired comparison, markdown."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEYS = ("model", "prompt", "category", "seed")


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass
class Scores:
    """One row an image: model, prompt, category, seed, and each reward's value."""

    rows: list[dict[str, str | int | float]] = field(default_factory=list)

    def add(self, model: str, prompts: Sequence[str], seeds: Sequence[int], values: dict[str, Sequence[float]], category: str = ""):
        """Append a batch; `values` holds a number per prompt for each reward."""
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            row = {"model": model, "prompt": prompt, "category": category, "seed": seed}
            self.rows.append(row | {name: float(column[index]) for name, column in values.items()})

    @property
    def models(self) -> list[str]:
        """Models in the order in which they came."""
        return list(dict.fromkeys(str(row["model"]) for row in self.rows))

    @property
    def rewards(self) -> list[str]:
        """Names of the scores."""
        return [name for name in dict.fromkeys(key for row in self.rows for key in row) if name not in KEYS]

    def column(self, model: str, reward: str) -> np.ndarray:
        """The values of one reward for one model, in row order."""
        return np.array([row[reward] for row in self.rows if row["model"] == model], dtype=np.float64)

    def mean(self, model: str, reward: str) -> Interval:
        """Mean with its 95 % bootstrap interval over images."""
        return bootstrap(self.column(model, reward))

    def paired(self, reward: str, first: str, second: str) -> Interval:
        """Mean difference second - first on the same prompts and seeds, with its 95 % bootstrap interval.

        Raises:
            ValueError: the two models were not scored on the same rows.
        """
        one, two = ([(row["prompt"], row["seed"]) for row in self.rows if row["model"] == model] for model in (first, second))
        if one != two:
            raise ValueError(f"{first} and {second} were not scored on the same prompts and seeds")
        return bootstrap(self.column(second, reward) - self.column(first, reward))

    def save(self, path: str | Path) -> Path:
        """Write a csv file with a row an image."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*KEYS, *self.rewards])
            writer.writeheader()
            writer.writerows(self.rows)
        return path

    def markdown(self) -> str:
        """Means and intervals, a row a model; further models also with their paired difference to the first."""
        base = self.models[0]
        lines = ["| model | " + " | ".join(self.rewards) + " |", "|---" * (len(self.rewards) + 1) + "|"]
        for model in self.models:
            lines.append(f"| {model} | " + " | ".join(str(self.mean(model, name)) for name in self.rewards) + " |")
        for model in self.models[1:]:
            cells = (str(self.paired(name, base, model)) for name in self.rewards)
            lines.append(f"| {model} - {base} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def bootstrap(values: np.ndarray, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean and percentile bootstrap 95 % interval of a sample; the same numbers for the same values."""
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))
