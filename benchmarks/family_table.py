"""The family's results.csv and checks.csv as markdown."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

SCORES = ("preference", "clip", "aesthetic", "oracle", "oracle_partial", "diversity")


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(results: Path, checks: Path, path: Path) -> None:
    """A line a method: means over its seeds, compute; then the checks."""
    rows = read(results)
    head = ["method", "seeds", "steps", "compute", *SCORES]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        seeds = sorted({int(row["seed"]) for row in own})
        cells = [method, str(len(seeds)), own[0]["steps"], f"{float(own[0]['compute']):,.0f}"]
        for score in SCORES:
            of = [row for row in own if row["score"] == score]
            mean, gain = (np.mean([float(row[key]) for row in of]) for key in ("mean", "gain"))
            single = f" [{float(of[0]['low']):+.3f}, {float(of[0]['high']):+.3f}]" if len(of) == 1 and method != "original" else ""
            cells.append(f"{mean:.3f}" + ("" if method == "original" else f" ({gain:+.3f}{single})"))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| check | claim | difference | 95 % | seeds | borne out |", "|---|---|---|---|---|---|"]
    for row in read(checks):
        interval = "" if row["borne_out"] == "not run" else f"{row['mean']} [{row['low']}, {row['high']}]"
        said = f"{row['difference']}, {row['score']}"
        lines.append(f"| {row['check']} | {row['claim']} | {said} | {interval} | {row['seeds']} | {row['borne_out']} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
