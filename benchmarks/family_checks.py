"""The paper's claims as named checks on the family's scores, each with its 95 % interval; nothing here is tuned to pass."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tc_lightning.report import Interval, Scores, bootstrap

Found = Mapping[tuple[str, int], Scores]
BASE = ("original", 0)
# check: (claim, better line, worse line, score); the difference better - worse is to be above zero
ABOVE = {
    "text_raises_preference": ("text tuning raises the trained reward", "textcraftor", "original", "preference"),
    "text_raises_oracle": ("text tuning raises what is never trained on", "textcraftor", "original", "oracle"),
    "full_raises_preference": ("the same, gradient through the full chain", "full_chain", "original", "preference"),
    "full_raises_oracle": ("the same, gradient through the full chain", "full_chain", "original", "oracle"),
    "all_raises_preference": ("all rewards: each rises", "all", "original", "preference"),
    "all_raises_aesthetic": ("all rewards: each rises", "all", "original", "aesthetic"),
    "all_raises_clip": ("all rewards: each rises", "all", "original", "clip"),
    "prompt_based_beats_direct": ("prompt-based beats direct", "textcraftor", "direct", "preference"),
    "beats_ddpo": ("beats DDPO at equal compute", "textcraftor", "ddpo", "preference"),
    "beats_prompt_engineering": ("beats prompt engineering", "textcraftor", "prompt_engineering", "preference"),
    "own_aesthetic_most": ("a single reward raises its own score most", "aesthetic", "textcraftor", "aesthetic"),
    "own_preference_most": ("a single reward raises its own score most", "textcraftor", "aesthetic", "preference"),
    "own_clip_most": ("a single reward raises its own score most", "clip", "aesthetic", "clip"),
    "free_preference_higher": ("without the constraint its own score is higher", "textcraftor_free", "textcraftor", "preference"),
    "free_aesthetic_higher": ("without the constraint its own score is higher", "aesthetic_free", "aesthetic", "aesthetic"),
    "free_clip_higher": ("without the constraint its own score is higher", "clip_free", "clip", "clip"),
    "constraint_keeps_oracle_preference": ("without it the oracle falls", "textcraftor", "textcraftor_free", "oracle"),
    "constraint_keeps_oracle_aesthetic": ("without it the oracle falls", "aesthetic", "aesthetic_free", "oracle"),
    "unet_on_top_adds": ("the UNet stage on top adds", "text_unet", "full_chain", "preference"),
    "unet_on_top_adds_oracle": ("the UNet stage on top adds", "text_unet", "full_chain", "oracle"),
    "truncated_beats_full_k7": ("truncated gradients beat the full chain", "textcraftor", "full_chain", "preference"),
    "truncated_beats_full_draft_1": ("truncated gradients beat the full chain", "draft_1", "full_chain", "preference"),
    "truncated_beats_full_random": ("truncated gradients beat the full chain", "alignprop", "full_chain", "preference"),
    "truncated_beats_full_drtune": ("truncated gradients beat the full chain", "drtune", "full_chain", "preference"),
}
INTERPOLATION = ("original", "interpolation_0.25", "interpolation_0.5", "interpolation_0.75", "full_chain")


def seeds_of(found: Found, name: str) -> list[int]:
    """The training seeds of a line."""
    return [seed for method, seed in found if method == name]


def prompt_means(scores: Scores, score: str) -> np.ndarray:
    """[P]: the mean over a prompt's images."""
    prompts = scores.over_seeds()
    return prompts.column(prompts.models[0], score)


def difference(found: Found, better: str, worse: str, score: str) -> tuple[Interval, int]:
    """Paired difference over prompts, averaged over the training seeds that both lines have; and how many those are."""
    fixed = {"original", "prompt_engineering"}
    seeds = set(seeds_of(found, better)) if worse in fixed else set(seeds_of(found, better)) & set(seeds_of(found, worse))
    if not seeds or not seeds_of(found, worse):
        return Interval(float("nan"), float("nan"), float("nan")), 0
    one = np.mean([prompt_means(found[better, seed], score) for seed in sorted(seeds)], axis=0)
    two = np.mean([prompt_means(found[worse, 0 if worse in fixed else seed], score) for seed in sorted(seeds)], axis=0)
    return bootstrap(one - two), len(seeds)


def outcome(interval: Interval, seeds: int) -> str:
    """What the interval says."""
    if not seeds:
        return "not run"
    return "yes" if interval.low > 0 else "no, the opposite" if interval.high < 0 else "not separable"


def write_checks(found: Found, path: Path) -> None:
    """A line a check: claim, lines compared, difference with its interval, seeds, outcome."""
    lines = []
    for name, (claim, better, worse, score) in ABOVE.items():
        interval, seeds = difference(found, better, worse, score)
        lines.append([name, claim, f"{better} - {worse}", score, *interval, seeds, outcome(interval, seeds)])
    for below, above in zip(INTERPOLATION, INTERPOLATION[1:], strict=False):
        interval, seeds = difference(found, above, below, "preference")
        claim = "interpolation is monotone between its ends"
        lines.append([f"monotone_{above}", claim, f"{above} - {below}", "preference", *interval, seeds, outcome(interval, seeds)])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["check", "claim", "difference", "score", "mean", "low", "high", "seeds", "borne_out"])
        for line in lines:
            writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in line])
