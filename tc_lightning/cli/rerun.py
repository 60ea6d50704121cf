"""rerun=<run folder>: the same run again, from what its run.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tc_lightning.cli import record

OWN = ("rerun", "ckpt_path")  # how a run is begun, not what it is


def expand(words: list[str]) -> list[str]:
    """The overrides of the run that rerun= names, then those that were given.

    Raises:
        ValueError: no run folder, or one of another verb.
    """
    named = [word.partition("=")[2] for word in words if word.startswith("rerun=")]
    if not named or named[-1] == "null":
        return words
    overrides = _record(Path(named[-1]))["overrides"]
    kept = [word for word in overrides if word.lstrip("+~").partition("=")[0] not in OWN]
    return [*kept, *words]


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"rerun={folder}: no run folder there (run.json cannot be read: {error})") from error
    if not isinstance(found, dict) or found.get("verb") != "train" or not isinstance(found.get("overrides"), list):
        raise ValueError(f"rerun={folder}: its run.json is of no training run")
    return found


def say_differences(config: dict[str, Any], folder: Path) -> list[str]:
    """Print where this run differs from the one it repeats: settings, versions, commit; returns the lines."""
    before = _record(folder)
    then, now = _flat(before.get("config", {})), _flat(record.redacted(config))
    changed = [key for key in {**then, **now} if then.get(key) != now.get(key) and key.partition(".")[0] not in OWN]
    # loggers hold the run folder, which is another by necessity
    lines = [f"{key}: {then.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in changed if not key.endswith("save_dir")]
    versions = record.versions()
    lines += [
        f"{name}: {was} -> {versions.get(name)}" for name, was in before.get("versions", {}).items() if versions.get(name) != was
    ]
    commit = record.git_commit()
    lines += [f"git: {before.get('git')} -> {commit}"] if before.get("git") != commit else []
    record.console.print(f"again {folder}" + (", but for" if lines else ""), markup=False)
    for line in lines:
        record.console.print(f"  {line}", markup=False)
    return lines


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    return {name: value for key, inner in node.items() for name, value in _flat(inner, f"{prefix}.{key}".strip(".")).items()}
