"""Scores of images: csv, means with intervals, paired comparison, plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEYS = ("model", "prompt", "category", "seed")
COLOURS = ("#4c6a92", "#d1793b", "#4f9d69", "#9c5aa6", "#b0a13a", "#7f7f7f")
MARKERS = "osD^"  # another one where the colours come again


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

    def wins(self, reward: str, first: str, second: str) -> tuple[float, float]:
        """Shares of images on which second scores above first, and on which they are equal (within 1e-6)."""
        difference = self.column(second, reward) - self.column(first, reward)
        return float((difference > 1e-6).mean()), float((abs(difference) <= 1e-6).mean())

    @property
    def categories(self) -> list[str]:
        """Categories in the order in which they came; nothing where the bench has none."""
        return [name for name in dict.fromkeys(str(row["category"]) for row in self.rows) if name]

    def only(self, category: str) -> Scores:
        """The rows of one category."""
        return Scores([row for row in self.rows if row["category"] == category])

    def over_seeds(self) -> Scores:
        """A row a prompt, the mean over its seeds: what an interval over prompts is drawn from."""
        names = self.rewards
        groups: dict[tuple, list[dict]] = {}
        for row in self.rows:
            groups.setdefault((row["model"], row["prompt"], row["category"]), []).append(row)
        means = ({name: sum(float(row[name]) for row in rows) / len(rows) for name in names} for rows in groups.values())
        return Scores([dict(zip(KEYS, (*key, 0), strict=True)) | mean for key, mean in zip(groups, means, strict=True)])

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file that `save` wrote."""
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        kinds = {"model": str, "prompt": str, "category": str, "seed": int}
        return cls([{name: kinds.get(name, float)(value) for name, value in row.items()} for row in rows])

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


def group_means(values: np.ndarray, size: int) -> tuple[float, float]:
    """Mean and standard deviation of the means of consecutive groups of `size`, the last one as long as what is left.

    So HPSv2's benchmark states a style of 800 prompts: ten groups of 80 (Wu et al. 2023, its evaluation program).
    """
    means = [values[start : start + size].mean() for start in range(0, len(values), size)]
    return float(np.mean(means)), float(np.std(means))


def summary(scores: Scores, measures: Sequence[str] = ()) -> dict:
    """Everything that the tables say, as plain data; intervals are over prompts, the seeds of a prompt averaged first.

    Args:
        scores: rows of one or more models on the same prompts and seeds; the first model is the base.
        measures: columns that are no scores (no direction is better): they get no win rate.
    """
    prompts, base = scores.over_seeds(), scores.models[0]

    def compare(name: str, model: str) -> dict[str, float]:
        found = prompts.paired(name, base, model)._asdict()
        return found if name in measures else found | dict(zip(("wins", "ties"), scores.wins(name, base, model), strict=True))

    return {
        "prompts": len(prompts.rows) // len(scores.models),
        "images": len(scores.rows) // len(scores.models),
        "base": base,
        "models": {model: {name: prompts.mean(model, name)._asdict() for name in scores.rewards} for model in scores.models},
        "against_base": {model: {name: compare(name, model) for name in scores.rewards} for model in scores.models[1:]},
        "categories": {
            category: {
                model: {name: prompts.only(category).mean(model, name).mean for name in scores.rewards} for model in scores.models
            }
            for category in scores.categories
        },
    }


def plot_reward(scores: Scores, reward: str, path: str | Path) -> Path:
    """A picture of one score: each model's mean and 95 % interval over prompts, over all and in each category."""
    from matplotlib.figure import Figure

    groups = [("all", scores.over_seeds()), *((name, scores.only(name).over_seeds()) for name in scores.categories)]
    models, step = scores.models, 0.8 / len(scores.models)
    figure = Figure(figsize=(7.0, 1.3 + (0.12 + 0.17 * len(models)) * len(groups)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name in models]
    for number, model in enumerate(models):
        means = [part.mean(model, reward) for _, part in groups]
        places = [index + (number - (len(models) - 1) / 2) * step for index in range(len(groups))]
        whiskers = [[value.mean - value.low for value in means], [value.high - value.mean for value in means]]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        style = {"fmt": marker, "markersize": 5, "capsize": 2.5, "color": COLOURS[number % len(COLOURS)], "label": names[number]}
        axes.errorbar([value.mean for value in means], places, xerr=np.maximum(whiskers, 0), **style)
    axes.set_yticks(range(len(groups)), [name if len(name) <= 32 else f"{name[:31]}…" for name, _ in groups])
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.set_xlabel(f"{reward}: mean, 95 % interval over prompts")
    axes.grid(axis="x", color="#e0e0e0")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.axhline(0.5, color="#b0b0b0", linewidth=0.8)
    columns = max(1, min(len(models), 80 // (max(map(len, names)) + 8)))  # about 80 letters fit a line of the legend
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
