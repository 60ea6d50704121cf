"""What a sweep gave: its jobs read from their folders, as a table and as one sheet of the same prompts and seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATUSES = ("finished", "interrupted", "failed", "running", "missing")
SHOWN = 8  # prompts on the sheet


@dataclass
class Job:
    """One job of a sweep: what it was asked, how it ended, what it gave."""

    folder: Path
    overrides: list[str]
    status: str = "missing"
    error: str = ""
    scores: dict[str, float] = field(default_factory=dict)


def without_resume(overrides: Sequence[str]) -> list[str]:
    """Overrides as they are compared: how a job is taken up again is none of its settings."""
    return [word for word in overrides if not word.startswith("ckpt_path=")]


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a folder, or {} where there is none or it is not whole."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_job(folder: Path, overrides: Sequence[str] = ()) -> Job:
    """A job from its folder; missing where it never began."""
    record = read_record(folder)
    if not record:
        return Job(folder, list(overrides))
    metrics = record.get("metrics", {})
    scores = {f"{when} {name}": value for when in ("before", "after") for name, value in metrics.get(when, {}).items()}
    scores |= {f"dev {name}": value for name, value in record.get("dev", {}).items()}
    given = without_resume(record.get("overrides", overrides))
    return Job(folder, given, record.get("status", "failed"), str(record.get("error", "")), scores)


def read_sweep(folder: Path) -> list[Job]:
    """The jobs that were planned (jobs.json), and those that are there, by number."""
    planned: dict[str, list[str]] = {}
    if (folder / "jobs.json").is_file():
        planned = json.loads((folder / "jobs.json").read_text(encoding="utf-8"))
    there = [child.name for child in folder.iterdir() if child.name.isdigit()]
    names = sorted({*planned, *there}, key=int)
    return [read_job(folder / name, planned.get(name, ())) for name in names]


def differing(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """{key: its value in each job} of the overrides that are not the same in all."""
    given = [dict(word.partition("=")[::2] for word in job.overrides) for job in jobs]
    keys = list(dict.fromkeys(key for words in given for key in words))
    return {key: [words.get(key, "") for words in given] for key in keys if len({words.get(key) for words in given}) > 1}


def label(jobs: Sequence[Job], index: int) -> str:
    """A job in a few words: the settings in which it differs."""
    words = [f"{key}={values[index]}" for key, values in differing(jobs).items() if values[index]]
    return f"{jobs[index].folder.name}: {' '.join(words) or 'as it is'}"


def write_tables(folder: Path) -> list[Job]:
    """sweep.csv, sweep.md and contact_sheet.png of a sweep's folder; returns the jobs."""
    jobs = read_sweep(folder)
    settings = differing(jobs)
    names = list(dict.fromkeys(name for job in jobs for name in job.scores))
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["job", *settings, "status", *names, "run_folder", "error"])
        for index, job in enumerate(jobs):
            values = [job.scores.get(name, "") for name in names]
            asked = [column[index] for column in settings.values()]
            writer.writerow([job.folder.name, *asked, job.status, *values, str(job.folder), job.error])
    (folder / "sweep.md").write_text(markdown(folder, jobs), encoding="utf-8")
    contact_sheet(folder, jobs)
    return jobs


def markdown(folder: Path, jobs: Sequence[Job]) -> str:
    """The table for people: scores after, as far as there are any, and the errors below it."""
    settings = differing(jobs)
    names = [n for n in dict.fromkeys(name for job in jobs for name in job.scores) if not n.startswith("before ")]
    head = ["job", *settings, "status", *names, "folder"]
    lines = [f"# {folder.name}", "", counts(jobs), "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for index, job in enumerate(jobs):
        values = [f"{job.scores[name]:.4f}" if name in job.scores else "" for name in names]
        asked = [column[index].replace("|", "\\|") for column in settings.values()]
        lines.append(f"| {' | '.join([job.folder.name, *asked, job.status, *values, job.folder.name + '/'])} |")
    failed = [f"- {label(jobs, i)}: {job.error.splitlines()[0]}" for i, job in enumerate(jobs) if job.error]
    return "\n".join([*lines, *(["", "Errors:", "", *failed] if failed else []), ""])


def counts(jobs: Sequence[Job]) -> str:
    """`6 jobs: 5 finished, 1 failed`."""
    found = {status: sum(job.status == status for job in jobs) for status in STATUSES}
    return f"{len(jobs)} jobs: " + ", ".join(f"{count} {status}" for status, count in found.items() if count)


def contact_sheet(folder: Path, jobs: Sequence[Job]) -> Path | None:
    """A row a finished job, a column a prompt, the same prompts and seeds in every row; None where no job has images."""
    import torch  # here, for the command line knows this module and is to start fast

    from tc_lightning.pixels import grid, load_png

    rows = {index: _last_images(job.folder) for index, job in enumerate(jobs)}
    rows = {index: images for index, images in rows.items() if images}
    shared = [name for name in next(iter(rows.values()), {}) if all(name in images for images in rows.values())][:SHOWN]
    if not shared:
        return None
    tensors = [[load_png(images[name]) for name in shared] for images in rows.values()]
    if len({tensor.shape for row in tensors for tensor in row}) > 1:
        return None  # of different sizes: there is no one sheet
    record = read_record(jobs[next(iter(rows))].folder)
    texts = record.get("samples_shown", [])
    labels = [texts[int(name.split("_")[0])] if int(name.split("_")[0]) < len(texts) else name for name in shared]
    picture = grid(
        torch.stack([torch.stack(row) for row in tensors]),
        row_labels=[label(jobs, index) for index in rows],
        column_labels=labels,
    )
    picture.save(folder / "contact_sheet.png")
    return folder / "contact_sheet.png"


def _last_images(folder: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted((folder / "samples" / "last").glob("*_0.png"))}
