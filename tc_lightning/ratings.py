"""Blind pairwise human evaluation of images that `evaluate` wrote (TextCraftor Table 3): pairs, answers, win rates."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tc_lightning.report import Interval, Scores

QUESTIONS = {"quality": "Which picture is the better picture?", "alignment": "Which picture fits the prompt better?"}
ANSWERS = ("left", "tie", "right")
COLUMNS = ("time", "rater", "pair", "question", "answer", "winner", "left", "right", "prompt", "seed")


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt and seed; which model stands on which side is a coin's choice."""

    key: str
    prompt: str
    seed: int
    left: str
    right: str
    left_file: Path
    right_file: Path


class WinRate(NamedTuple):
    """How a model does against the base on one question."""

    model: str
    base: str
    question: str
    wins: int
    ties: int
    losses: int
    rate: Interval


def read_pairs(folder: str | Path, rater: str = "1", limit: int | None = None) -> list[Pair]:
    """Every model against the first, on each prompt and seed whose images were kept, in an order and on sides of the rater's own.

    Args:
        folder: a finished run folder of `evaluate` with two or more models; `shown=-1` kept all images, else some.
        rater: another rater gets another order and other sides.
        limit: at most so many pairs.

    Raises:
        ValueError: no such evaluation, fewer than two models, or no image that both models have.
    """
    folder = Path(folder)
    if not (folder / "scores.csv").is_file():
        raise ValueError(
            f"{folder} holds no finished evaluation (scores.csv): python -m tc_lightning evaluate run='[a,b]' shown=-1"
        )
    scores = Scores.load(folder / "scores.csv")
    if len(scores.models) < 2:
        raise ValueError(f"{folder} evaluates {scores.models}: a comparison needs two models, evaluate run='[a,b]' shown=-1")
    base, pairs = scores.models[0], []
    files = {model: _files(folder, scores, model) for model in scores.models}
    for model in scores.models[1:]:
        for prompt, seed, place in files[model]:
            one, two = (_image(folder, name, place) for name in (base, model))
            if one.is_file() and two.is_file():
                pairs.append(_pair(f"{model}/{place}", prompt, seed, (base, one), (model, two), rater))
    if not pairs:
        raise ValueError(f"{folder}/images holds no image that two models have: evaluate with shown=-1")
    random.Random(f"order {rater}").shuffle(pairs)
    return pairs[:limit]


def _files(folder: Path, scores: Scores, model: str) -> list[tuple[str, int, str]]:
    """(prompt, seed, name of the image) of each row: images are named by the prompt's row and the number of the seed."""
    rows = [row for row in scores.rows if row["model"] == model]
    seeds = _seeds(folder, len(rows))
    return [(str(row["prompt"]), int(row["seed"]), f"{i // seeds:05d}_{i % seeds}") for i, row in enumerate(rows)]


def _seeds(folder: Path, rows: int) -> int:
    file = folder / "evaluation.json"
    seeds = json.loads(file.read_text(encoding="utf-8")).get("seeds", 0) if file.is_file() else 0
    if seeds < 1 or rows % seeds:
        raise ValueError(f"{folder}: evaluation.json and scores.csv do not belong together")
    return seeds


def _image(folder: Path, model: str, place: str) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in model)
    return folder / "images" / safe / f"{place}.png"


def _pair(key: str, prompt: str, seed: int, base: tuple[str, Path], other: tuple[str, Path], rater: str) -> Pair:
    sides = [base, other]
    random.Random(f"sides {rater} {key}").shuffle(sides)
    (left, left_file), (right, right_file) = sides
    return Pair(key, prompt, seed, left, right, left_file, right_file)


class Ratings:
    """One rater's way through the pairs, two questions each; an answer is on the disk before the next question is asked.

    Args:
        pairs: as `read_pairs` gives them.
        file: CSV that answers are appended to; a file that is there is continued.
        rater: written into each row.
    """

    def __init__(self, pairs: Sequence[Pair], file: str | Path, rater: str = "1") -> None:
        self.file, self.rater = Path(file), str(rater)
        self.tasks = [(pair, question) for pair in pairs for question in QUESTIONS]
        done = {(row["pair"], row["question"]) for row in read_answers(self.file) if row["rater"] == self.rater}
        self.position = next((i for i, (pair, q) in enumerate(self.tasks) if (pair.key, q) not in done), len(self.tasks))

    @property
    def current(self) -> tuple[Pair, str] | None:
        """What is asked now, None when all is answered."""
        return self.tasks[self.position] if self.position < len(self.tasks) else None

    @property
    def token(self) -> str:
        """Names what is asked now; an answer must carry it, so that it is to what was on the screen."""
        return str(self.position)

    def answer(self, token: str, answer: str) -> bool:
        """Write an answer to what `token` names and go on; False, and nothing written, where that is not asked now.

        Raises:
            ValueError: no such answer.
        """
        if answer not in ANSWERS:
            raise ValueError(f"answer {answer!r}, accepted: {', '.join(ANSWERS)}")
        if self.current is None or token != self.token:
            return False
        pair, question = self.current
        winner = {"left": pair.left, "right": pair.right, "tie": "tie"}[answer]
        row = (time.strftime("%Y-%m-%dT%H:%M:%S"), self.rater, pair.key, question, answer, winner)
        _append(self.file, (*row, pair.left, pair.right, pair.prompt, pair.seed))
        self.position += 1
        return True

    def back(self) -> None:
        """Ask the question before again; its new answer counts."""
        self.position = max(0, self.position - 1)


def _append(file: Path, row: Sequence[object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torn = file.is_file() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    with file.open("a", newline="", encoding="utf-8") as opened:
        opened.write("\n" if torn else "")  # ends a line that a crash left unfinished
        writer = csv.writer(opened)
        if opened.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow(row)
        opened.flush()
        os.fsync(opened.fileno())


def read_answers(file: str | Path) -> list[dict[str, str]]:
    """The rows of an answers' file, the last answer to each question; a line cut short is left out."""
    if not Path(file).is_file():
        return []
    with Path(file).open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row.get("seed") is not None and row["answer"] in ANSWERS]
    return list({(row["rater"], row["pair"], row["question"]): row for row in rows}.values())


def win_rates(answers: Sequence[dict[str, str]]) -> list[WinRate]:
    """Each model against the base on each question; a tie is half a win.

    The interval is Wilson's (1927), 95 %, with as many trials as there are prompts: several seeds or raters of a prompt are
    averaged first, for they are not independent.
    """
    found = []
    models = dict.fromkeys(_sides(row)[0] for row in answers)
    for model in models:
        for question in QUESTIONS:
            rows = [row for row in answers if row["question"] == question and _sides(row)[0] == model]
            if not rows:
                continue
            prompts = defaultdict(list)
            for row in rows:
                prompts[row["prompt"]].append(0.5 if row["winner"] == "tie" else float(row["winner"] == model))
            mean = math.fsum(sum(values) / len(values) for values in prompts.values()) / len(prompts)
            ties = sum(row["winner"] == "tie" for row in rows)
            wins = sum(row["winner"] == model for row in rows)
            rate = Interval(mean, *wilson(mean, len(prompts)))
            found.append(WinRate(model, _sides(rows[0])[1], question, wins, ties, len(rows) - wins - ties, rate))
    return found


def _sides(row: dict[str, str]) -> tuple[str, str]:
    """(model, base) of a row: the pair's key begins with the model."""
    model = row["pair"].rpartition("/")[0]
    return model, row["right"] if row["left"] == model else row["left"]


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of `count` trials (Wilson's score interval)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def markdown(rates: Sequence[WinRate]) -> str:
    """The table of win rates."""
    lines = ["| model | against | question | win rate, 95 % | wins | ties | losses |", "|---|---|---|---|---|---|---|"]
    for row in rates:
        rate = f"{row.rate.mean:.1%} [{row.rate.low:.1%}, {row.rate.high:.1%}]"
        lines.append(f"| {row.model} | {row.base} | {row.question} | {rate} | {row.wins} | {row.ties} | {row.losses} |")
    return "\n".join(lines) + "\n"
