"""Bench x models x rewards -> Scores: one noise seed an image, taken up again where it was left.

A score depends on the model, the prompt and the number of the seed alone: not on the batch, on other prompts, on their
order, or on how many processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_lightning.benches import Bench
from tc_lightning.measures import MEASURES
from tc_lightning.noise import derive_seed
from tc_lightning.pixels import grid, load_png, save_png
from tc_lightning.report import Scores, plot_reward, summary
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.sampling import Sampler
from tc_lightning.scoring import Scorer, find_tower
from tc_lightning.tables import evaluation_markdown, verdict

Say = Callable[[str, int, int, float], None]


def image_seed(prompt: str, occurrence: int, number: int) -> int:
    """Noise seed of the image `number` of a prompt that came `occurrence` times before in its bench."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=7).digest()
    return derive_seed(0, 16, int.from_bytes(digest, "big"), occurrence, number)


@dataclass
class Evaluation:
    """What is evaluated, and the folder where it is kept.

    Args:
        bench: the prompts.
        models: name -> a function that loads the model; one is in memory at a time. The first is the base.
        rewards: the scores; weights play no part.
        folder: holds progress/ (a line a finished prompt) and, for the first `shown` prompts, images/.
        seeds: images a prompt.
        batch_size: images between two writes of progress; it does not change the scores.
        shown: prompts whose images are kept for grids; -1 keeps every image.
        micro_batch: images computed at once, always so many (see scoring): what fits the memory, best a divisor of batch_size.
        settings: whatever else decides the scores; a folder is not continued with other settings.

    Raises:
        ValueError: no model, or seeds, batch_size or micro_batch below 1.
        FileExistsError: the folder holds another evaluation.
    """

    bench: Bench
    models: Mapping[str, Callable[[], Sampler]]
    rewards: RewardMix
    folder: Path
    seeds: int = 1
    batch_size: int = 16
    shown: int = 16
    micro_batch: int = 8
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("seeds", "batch_size", "micro_batch")}
        if not self.models or min(numbers.values()) < 1:
            given = ", ".join(f"{name}={value}" for name, value in numbers.items())
            raise ValueError(f"{len(self.models)} models, {given}: accepted: 1 or more of each")
        self.folder = Path(self.folder)
        self._claim()

    def _claim(self) -> None:
        """Write down what is evaluated; refuse a folder where it was something else."""
        prompts = hashlib.blake2b(json.dumps([self.bench.prompts, self.bench.categories]).encode(), digest_size=8).hexdigest()
        mine = {"bench": self.bench.name, "prompts": prompts, "models": list(self.models), "seeds": self.seeds}
        mine["micro_batch"] = self.micro_batch  # another one changes the last digits
        mine = json.loads(json.dumps({**mine, "rewards": list(self.rewards.rewards), **self.settings}, default=str))
        file = self.folder / "evaluation.json"
        if file.is_file():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            odd = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            if odd:
                raise FileExistsError(
                    f"{self.folder} holds another evaluation ({odd[0]}: {theirs.get(odd[0])}, now {mine.get(odd[0])}): "
                    "choose another folder with hydra.run.dir=..., or set it as it was to continue"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"evaluation.json.{os.getpid()}"
        part.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        os.replace(part, file)

    def finished(self, model: str) -> dict[int, list[dict[str, Any]]]:
        """Row of the bench -> its finished images, whichever process made them; a line cut short is left out."""
        done: dict[int, list[dict[str, Any]]] = {}
        for file in sorted(self._place(model).parent.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the process was killed while it wrote
                    continue
                done[entry["row"]] = entry["images"]
        return done

    def run(self, rank: int = 0, world: int = 1, say: Say = lambda model, done, of, left: None) -> bool:
        """Score what is not yet finished of this process's share; True when every image of every model is scored.

        Args:
            rank, world: which of how many processes; each takes every world-th prompt.
            say: told after each batch: model, images scored here, images to score here, seconds left.
        """
        for model in self.models:
            done = self.finished(model)
            rows = [row for row in range(len(self.bench)) if row % world == rank and row not in done]
            if rows:
                self._run_model(model, rows, rank, say)
        return all(len(self.finished(model)) == len(self.bench) for model in self.models)

    def _run_model(self, model: str, rows: list[int], rank: int, say: Say) -> None:
        sampler = self.models[model]()
        place = self._place(model, rank)
        place.parent.mkdir(parents=True, exist_ok=True)
        began, scored, of = time.monotonic(), 0, len(rows) * self.seeds
        size = max(1, self.batch_size // self.seeds)  # prompts whose images are made and scored together
        with place.open("a", encoding="utf-8") as file:
            file.write("\n" if file.tell() else "")  # ends a line that a killed process left unfinished
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                for row, images in zip(chunk, self._score(sampler, model, chunk), strict=True):
                    file.write(json.dumps({"row": row, "images": images}) + "\n")
                file.flush()
                scored += len(chunk) * self.seeds
                say(model, scored, of, (time.monotonic() - began) / scored * (of - scored))

    def _score(self, sampler: Sampler, model: str, chunk: list[int]) -> list[list[dict[str, Any]]]:
        """Per prompt of the chunk, per seed: {"seed": s, <score>: value, ...}."""
        prompts = [self.bench.prompts[row] for row in chunk for _ in range(self.seeds)]
        occurrences = self.bench.occurrences
        seeds = [image_seed(self.bench.prompts[row], occurrences[row], number) for row in chunk for number in range(self.seeds)]
        images, columns = Scorer(sampler, self.rewards, self.seeds, self.micro_batch)(prompts, seeds)
        self._keep(model, chunk, images)
        lists = {name: column.tolist() for name, column in columns.items()}
        flat = [{"seed": seed} | {name: lists[name][i] for name in lists} for i, seed in enumerate(seeds)]
        return [flat[i : i + self.seeds] for i in range(0, len(flat), self.seeds)]

    def _keep(self, model: str, chunk: list[int], images: Tensor) -> None:
        names = [f"{row:05d}_{number}" for row in chunk for number in range(self.seeds)]
        kept = [i for i, name in enumerate(names) if self.shown < 0 or int(name[:5]) < self.shown]
        if kept:
            save_png(images[kept], self.folder / "images" / _safe(model), [names[i] for i in kept])

    def _place(self, model: str, rank: int = 0) -> Path:
        return self.folder / "progress" / _safe(model) / f"{rank}.jsonl"

    def scores(self) -> Scores:
        """The table of what is finished, in the bench's order."""
        rows = []
        for model in self.models:
            done = self.finished(model)
            for row in sorted(done):
                key = {"model": model, "prompt": self.bench.prompts[row], "category": self.bench.categories[row]}
                rows += [key | image for image in done[row]]
        return Scores(rows)

    def grids(self, rows_a_picture: int = 6) -> list[Path]:
        """Pictures of the kept images: a prompt a row, a model a column, the scores under each image."""
        count, paths = min(self.shown if self.shown >= 0 else 48, len(self.bench)), []
        rewards = list(self.rewards.rewards)
        finished = {model: self.finished(model) for model in self.models}
        for start in range(0, count, rows_a_picture):
            rows = range(start, min(start + rows_a_picture, count))
            pictures = [torch.stack([self._image(model, row) for model in self.models]) for row in rows]
            labels = [[_label(finished[model][row][0], rewards) for model in self.models] for row in rows]
            prompts = [self.bench.prompts[row] for row in rows]
            place = self.folder / "grids" / f"{start // rows_a_picture:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            grid(torch.stack(pictures), row_labels=prompts, column_labels=list(self.models), cell_labels=labels).save(place)
            paths.append(place)
        return paths

    def _image(self, model: str, row: int) -> Tensor:
        return load_png(self.folder / "images" / _safe(model) / f"{row:05d}_0.png")


def _label(scores: Mapping[str, float], rewards: Sequence[str]) -> str:
    return "\n".join(f"{name} {scores[name]:.3g}" for name in rewards)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def write_report(evaluation: Evaluation, trained_on: Mapping[str, Sequence[str]] | None = None) -> Scores:
    """Write scores.csv (a row an image), scores.json, scores.md, grids/ and plots/ of a finished evaluation.

    Args:
        trained_on: model -> names of the scores it was trained on, for the verdict.
    """
    scores, folder = evaluation.scores(), evaluation.folder
    scores.save(folder / "scores.csv")
    verdicts = [verdict(scores, model, (trained_on or {}).get(model, ()), MEASURES) for model in scores.models[1:]]
    found = {"bench": evaluation.bench.name, "seeds": evaluation.seeds, "trained_on": dict(trained_on or {}), "verdicts": verdicts}
    text = json.dumps(found | summary(scores, MEASURES), indent=1, ensure_ascii=False)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    notes = [*verdicts, "", _explain(scores, evaluation.rewards)]
    (folder / "scores.md").write_text(
        evaluation_markdown(scores, f"Bench {evaluation.bench.name}", notes, MEASURES, evaluation.bench.group), encoding="utf-8"
    )
    for name in scores.rewards:
        plot_reward(scores, name, folder / "plots" / f"{_safe(name)}.png")
    evaluation.grids()
    return scores


def _explain(scores: Scores, rewards: RewardMix) -> str:
    tower = next((name for name, reward in rewards.rewards.items() if find_tower(reward) is not None), "")
    lines = {
        "diversity": f"diversity: mean pairwise CLIP distance of a prompt's images ({tower}'s image tower)",
        "saturation": "saturation: share of pixel values at the ends of the range",
        "text_drift": "text_drift: relative change of the prompt's embedding from the original text encoder's",
    }
    return "; ".join(lines[name] for name in lines if name in scores.rewards) + "."
