"""The whole family of methods on the embedded model at equal compute: one resumable command, one table.

    python benchmarks/family.py [folder] [compute] [seeds] [name ...]

    python benchmarks/family.py runs/family 24000 3         the table of docs/family.md (hours on 2 cores)
    python benchmarks/family.py /tmp/try 480 1 draft_1      one row, to see that it works

Compute is counted in evaluations of the UNet in rows (guidance makes two rows of a step): a forward counts 1, a backward 2,
as is usual for a network of which weights or inputs are differentiated; nothing is recomputed here. A row's number of
optimizer steps is what its schedule leaves of the budget. Text encoder, decoder and rewards are not counted, nor is the
evaluation. A row that is finished is not run again, one that was cut short is resumed. After every row the folder holds
results.csv (a line a method, seed and score, with the paired difference from the original and its 95 % interval), checks.csv
and table.md. Learning rates are the main job's for the text encoder, 1e-5 for the UNet: none was tuned for a method.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from family_checks import write_checks
from family_table import write_table

import tc_lightning as tc
from tc_lightning.backbone import Backbone, quiet_loading
from tc_lightning.benches import Bench
from tc_lightning.cli.generate import trained_settings
from tc_lightning.evaluate import Evaluation
from tc_lightning.mixing import mixed_text_encoder, with_text_encoder
from tc_lightning.report import Scores
from tc_lightning.rewards.tiny import tiny_aesthetic, tiny_clip, tiny_preference
from tc_lightning.rewriting import Modifiers
from tc_lightning.sampling import Sampler
from tc_lightning.tiny.model import SAMPLING

STEPS, ROWS = SAMPLING["steps"], 2  # of the chain; rows a step under guidance
PROMPTS, SEEDS = 128, 2  # of the evaluation: held-out prompts, images a prompt
BATCH = 8
ON_POLICY = ("method.tuned_from_start=true",)
K7 = ("schedule=last_k", "schedule.k=7", "tuned_fraction=0.7")
UNET = ("tune.text_encoder=frozen", "tune.unet=full", "optimizer.lr=1e-5")
ALL = ("reward=[tiny_preference,tiny_aesthetic,tiny_clip]",)
FREE = ("constraint=none",)


@dataclass(frozen=True)
class Row:
    """A line of the table: overrides of `train`, UNet forwards and backwards of a sample (a chain's steps, not rows)."""

    name: str
    overrides: tuple[str, ...]
    cost: tuple[float, float]
    batch: int = BATCH
    images: int = 1  # a prompt
    after: str | None = None  # a row whose tuned text encoder it starts from

    def steps(self, compute: float) -> int:
        """Optimizer steps that the budget allows, at least one."""
        forwards, backwards = self.cost
        return max(1, round(compute / (self.batch * self.images * ROWS * (forwards + 2 * backwards))))


def rows() -> list[Row]:
    """All trained lines."""
    full, k7 = tc.FullChain().cost(STEPS), tc.LastK(7).cost(STEPS)
    lines = [
        Row("full_chain", ("schedule=full",), full),
        Row("textcraftor", K7, k7),
        Row("textcraftor_free", (*K7, *FREE), k7),
        Row("direct", ("method=direct",), (1, 1)),
        Row("draft_1", ("schedule=last_k", "schedule.k=1", *ON_POLICY), tc.LastK(1).cost(STEPS)),
        Row("ddpo", ("method=ddpo", "prompts.batch_size=2"), (2 * STEPS, STEPS), 2, 4),
        Row("refl", ("schedule=single_step", *ON_POLICY), tc.SingleStep().cost(STEPS)),
        Row("draft_lv", ("schedule=low_variance", *ON_POLICY), tc.LowVariance().cost(STEPS)),
        Row("alignprop", ("schedule=random_k", *ON_POLICY), tc.RandomK().cost(STEPS)),
        Row("drtune", ("schedule=drtune",), tc.DRTune(k=5).cost(STEPS)),
        Row("aesthetic", (*K7, "reward=[tiny_aesthetic]"), k7),
        Row("aesthetic_free", (*K7, "reward=[tiny_aesthetic]", *FREE), k7),
        Row("clip", (*K7, "reward=[tiny_clip]"), k7),
        Row("clip_free", (*K7, "reward=[tiny_clip]", *FREE), k7),
        Row("all", (*K7, *ALL), k7),
        Row("unet", ("schedule=full", *UNET), full),
        Row("text_unet", ("schedule=full", *UNET), full, after="full_chain"),
    ]
    return lines


def train(row: Row, seed: int, compute: float, place: Path) -> dict:
    """Train, or go on training, one line in `place`; its run.json."""
    card = place / "run.json"
    if card.is_file() and json.loads(card.read_text())["status"] == "finished":
        return json.loads(card.read_text())
    steps = row.steps(compute)
    given = [*row.overrides, f"seed={seed}", f"max_steps={steps}", f"hydra.run.dir={place}", "val.every=0"]
    given += ["~callbacks.before_after", "~callbacks.sample_grid", "~callbacks.progress", "+trainer.enable_progress_bar=false"]
    given += [f"lr_scheduler.num_warmup_steps={min(15, max(1, steps // 5))}", "checkpoint_every=10"]
    if not any(word.startswith("prompts.batch_size") for word in given):
        given.append(f"prompts.batch_size={row.batch}")
    if row.after:
        given.append(f"backbone.text_encoder={place.parent.parent / row.after / str(seed)}")
    if card.is_file():
        last = place / "checkpoints" / "last.ckpt"
        given += ["ckpt_path=last"] if last.is_file() else []
        card.unlink()
    place.mkdir(parents=True, exist_ok=True)
    with (place / "log.txt").open("a") as log:
        ended = subprocess.run([sys.executable, "-m", "tc_lightning", "train", *given], stdout=log, stderr=log)
    if ended.returncode:
        sys.exit(f"{row.name}, seed {seed}: train ended with {ended.returncode}, see {place / 'log.txt'}; the same command goes on")
    return json.loads(card.read_text())


def sampler_of(name: str, place: Path | None) -> Sampler:
    """The model of a line as it is tested."""
    if place is None:
        return Sampler(Backbone.load("tiny"), **SAMPLING, rewriter=Modifiers() if name == "prompt_engineering" else None)
    backbone = Backbone.load(place)
    settings = trained_settings(place, backbone)
    original = Backbone.load("tiny").text_encoder if settings["tuned_fraction"] < 1 else None
    return Sampler(backbone, **SAMPLING, tuned_fraction=settings["tuned_fraction"], original=original)


def interpolated(weight: float, place: Path) -> Sampler:
    """(1 - w) original + w tuned, in embedding space."""
    base, tuned = Backbone.load("tiny"), Backbone.load(place).text_encoder
    mixed = mixed_text_encoder(base.text_encoder, {"tuned": tuned}, [1 - weight, weight])
    return Sampler(with_text_encoder(base, mixed), **SAMPLING)


def evaluate(name: str, load, folder: Path) -> Scores:
    """Scores of a line on held-out prompts, taken up where they were left."""
    rewards = {"preference": tiny_preference(), "clip": tiny_clip(), "aesthetic": tiny_aesthetic()}
    rewards |= {"oracle": tc.rewards.Oracle(strict=True), "oracle_partial": tc.rewards.Oracle(strict=False)}
    bench = Bench.shapes(PROMPTS)
    evaluation = Evaluation(bench, {name: load}, tc.RewardMix(rewards), folder, seeds=SEEDS, batch_size=32, shown=0)
    evaluation.run()
    return evaluation.scores()


def jobs(seeds: int) -> list[tuple[str, int, Row | None, float | None]]:
    """(name, seed, trained row, interpolation weight) in the order of work: every method with seed 0 first."""
    found: list[tuple[str, int, Row | None, float | None]] = [("original", 0, None, None), ("prompt_engineering", 0, None, None)]
    for seed in range(seeds):
        found += [(row.name, seed, row, None) for row in rows()]
        found += [(f"interpolation_{weight}", seed, None, weight) for weight in (0.25, 0.5, 0.75)]
    return found


def write_results(folder: Path, done: list[tuple[str, int, dict, Scores]]) -> None:
    """results.csv, checks.csv and table.md of the lines that are finished."""
    lines, base = [], next(scores for name, _, _, scores in done if name == "original")
    for name, seed, about, scores in done:
        both = Scores([row | {"model": "original"} for row in base.rows] + [row | {"model": name + "'"} for row in scores.rows])
        for score in scores.rewards:
            prompts = both.over_seeds()
            mean, gain = prompts.mean(name + "'", score), prompts.paired(score, "original", name + "'")
            line = {"method": name, "seed": seed, "score": score, "mean": mean.mean, "gain": gain.mean}
            lines.append(line | {"low": gain.low, "high": gain.high, **about})
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[-1]), restval="")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in line.items()})
    write_checks({(name, seed): scores for name, seed, _, scores in done}, folder / "checks.csv")
    write_table(folder / "results.csv", folder / "checks.csv", folder / "table.md")


def main(folder: Path, compute: float, seeds: int, only: list[str]) -> None:
    """Run what is missing, write the tables after every line."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "family.json"
    if settings.is_file() and json.loads(settings.read_text())["compute"] != compute:
        sys.exit(f"{folder} holds a table of compute {json.loads(settings.read_text())['compute']}: choose another folder")
    settings.write_text(json.dumps({"compute": compute}))
    done: list[tuple[str, int, dict, Scores]] = []
    for name, seed, row, weight in jobs(seeds):
        if only and name not in [*only, "original"]:
            continue
        place = folder / "runs" / name / str(seed)
        about = {"steps": 0, "forwards": 0.0, "backwards": 0.0, "compute": 0.0}
        load = lambda name=name: sampler_of(name, None)  # noqa: E731
        if weight is not None:
            source = folder / "runs" / "full_chain" / str(seed)
            load = lambda weight=weight, source=source: interpolated(weight, source)  # noqa: E731
        elif row is not None:
            began = time.monotonic()
            card = train(row, seed, compute, place)
            cost = card["unet"]
            spent = card["samples"] * (cost["forwards"] + 2 * cost["backwards"])
            about = {"steps": card["steps"], **cost, "compute": round(spent)}
            print(f"{name} {seed}: trained, {time.monotonic() - began:.0f} s here", flush=True)
            load = lambda name=name, place=place: sampler_of(name, place)  # noqa: E731
        done.append((name, seed, about, evaluate(name, load, folder / "scores" / name / str(seed))))
        write_results(folder, done)
        print(f"{name} {seed}: scored", flush=True)
    print((folder / "table.md").read_text())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_loading()
    words = sys.argv[1:]
    main(
        Path(words[0] if words else "runs/family"),
        float(words[1]) if len(words) > 1 else 24000.0,
        int(words[2]) if len(words) > 2 else 3,
        words[3:],
    )
