"""The paper's tables: rows of conf/table/<name>.yaml, each a training run and how it is tested."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from tc_lightning.cli import record

# settings of train that do not decide what is learned
ASIDE = ("callbacks", "logger", "trainer", "val", "watch", "ckpt_path", "checkpoint_every")


def take_rows(cfg: DictConfig) -> None:
    """Turn the rows of table= into run=; train the ones that are missing, or say how.

    Raises:
        ValueError: no such backbone in the table, rows that are not trained and train=false, a training that failed, or
            a folder that holds another run.
    """
    table = OmegaConf.to_container(cfg.table, resolve=True)
    kinds = [name for name, value in table.items() if isinstance(value, dict)]
    if table["backbone"] not in kinds:
        raise ValueError(f"table.backbone={table['backbone']}: accepted are {', '.join(kinds)}")
    part = table[table["backbone"]]
    place = Path(cfg.runs) / table["backbone"]
    jobs = _jobs(part, table["backbone"], place, list(cfg.train_with))
    missing = {folder: words for folder, words in jobs.items() if not _finished(folder, words)}
    if missing and (not cfg.train or cfg.shard is not None):
        commands = "\n".join(f"  {_command(folder, words)}" for folder, words in missing.items())
        raise ValueError(
            f"{len(missing)} of {len(jobs)} runs of this table are not there; train=true trains them, or do it:\n{commands}"
        )
    for number, (folder, words) in enumerate(missing.items(), 1):
        record.console.print(f"\ntraining {number} of {len(missing)}: {folder.name}", markup=False)
        _train(folder, words)
    rows = [{key: value for key, value in row.items() if key != "train"} for row in part["rows"]]
    cfg.run = [{**row, "run": row["run"] if row["run"] == "base" else str(place / row["run"])} for row in rows]


def _jobs(part: dict[str, Any], backbone: str, place: Path, more: list[str]) -> dict[Path, list[str]]:
    """Run folder -> the words that train it; a row that names an earlier row's run adds none."""
    jobs: dict[Path, list[str]] = {}
    for row in part["rows"]:
        folder = place / row["run"]
        if row["run"] != "base" and folder not in jobs:
            jobs[folder] = [f"backbone={backbone}", *part.get("train", []), *row.get("train", []), *more]
    return jobs


def _finished(folder: Path, words: list[str]) -> bool:
    """Whether the folder holds this run, finished; composing it finds a mistake in its words before hours of training."""
    asked = compose("train", overrides=words)
    if not (folder / "run.json").is_file():
        return False
    card = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    mine = {key: value for name in asked if name not in ASIDE for key, value in _leaves(asked[name], name).items()}
    theirs = _leaves(card["config"])
    odd = sorted(key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key])
    if odd:
        raise ValueError(
            f"{folder} holds another run than this table's ({odd[0]}: {theirs[odd[0]]}, here {mine[odd[0]]}): "
            "choose another place with runs=<folder>"
        )
    return card["status"] == "finished"


def _leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested settings."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, part in node.items() for key, value in _leaves(part, f"{path}.{name}".strip(".")).items()}


def _arguments(folder: Path, words: list[str]) -> list[str]:
    last = folder / "checkpoints" / "last.ckpt"
    return ["-m", "tc_lightning", "train", *words, f"hydra.run.dir={folder}", *(["ckpt_path=last"] if last.is_file() else [])]


def _command(folder: Path, words: list[str]) -> str:
    return shlex.join(["python", *_arguments(folder, words)])


def _train(folder: Path, words: list[str]) -> None:
    done = subprocess.run([sys.executable, *_arguments(folder, words)], check=False)
    if done.returncode:
        raise ValueError(f"the training of {folder.name} ended with {done.returncode}; alone it is: {_command(folder, words)}")
