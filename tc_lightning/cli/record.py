"""run.json: what a run was, how it ended, what it gave; and the tables printed before and after."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PACKAGES = ("tc_lightning", "torch", "pytorch-lightning", "diffusers", "transformers", "torchmetrics", "hydra-core", "peft")
SECRET_NAME = re.compile(r"TOKEN$|SECRET|PASSWORD|API_KEY|ACCESS_KEY", re.IGNORECASE)
SECRET_KEY = re.compile(r"(^|[.+_])(token|secret|password|api_key|access_key)$", re.IGNORECASE)
console = Console(highlight=False, soft_wrap=True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """The checkout's commit, with + for uncommitted changes; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def secrets() -> list[str]:
    """Values of environment variables whose names say that nobody is to read them."""
    named = ((name, value) for name, value in os.environ.items() if SECRET_NAME.search(name))
    return sorted((value for _, value in named if len(value) >= 8), key=len, reverse=True)


def redacted(value: Any) -> Any:
    """Plain data without the secrets of the environment, which settings can take in with ${oc.env:...}."""
    text = json.dumps(value, default=str)
    for secret in secrets():
        text = text.replace(json.dumps(secret)[1:-1], "***")
    return json.loads(text)


def refuse_secrets(words: list[str]) -> None:
    """A run folder keeps the overrides that made it: none may hold a secret.

    Raises:
        ValueError: a setting called like a secret, or one that holds the value of such an environment variable.
    """
    for word in words:
        key, _, value = word.partition("=")
        if value not in ("", "null") and SECRET_KEY.search(key) or any(secret in word for secret in secrets()):
            raise ValueError(f"{key}=... holds a secret, and overrides are written to the run folder: set it in the environment")


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json whole or not at all."""
    part = folder / "run.json.part"
    part.write_text(json.dumps(redacted(record), indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "run.json")


def hold(folder: Path, wait: float = 0.0) -> object:
    """Keep the folder to this process for as long as what is returned lives.

    Raises:
        FileExistsError: another process writes there, after `wait` seconds too.
    """
    if fcntl is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() - began >= wait:
                raise FileExistsError(f"another process is writing to {folder}: wait for it, or end it") from error
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return file


def write_failure(folder: Path, verb: str, overrides: list[str], message: str) -> None:
    """run.json of a run that failed before or while it wrote its own."""
    file = folder / "run.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"verb": verb, "overrides": overrides}
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder, {**known, "status": "failed", "error": message})


def write_hydra(folder: Path, cfg: DictConfig) -> None:
    """Write .hydra/ as Hydra does: config.yaml, hydra.yaml, overrides.yaml."""
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    OmegaConf.save(HydraConfig.instance().cfg, folder / ".hydra" / "hydra.yaml")
    OmegaConf.save(HydraConfig.get().overrides.task, folder / ".hydra" / "overrides.yaml")


def unfinished(folder: Path) -> bool:
    """Whether a run began there and did not finish."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("status") != "finished"


def refuse_overwrite(folder: Path, resuming: bool = False) -> None:
    """A run folder that holds a run is written to only to resume it.

    Raises:
        FileExistsError: says how to resume or where to go.
    """
    if (folder / "run.json").exists() and not resuming:
        raise FileExistsError(
            f"{folder} holds a run already: choose another folder with hydra.run.dir=..., or resume training with ckpt_path=last"
        )


def table(title: str, rows: dict[str, Any]) -> None:
    """Print a two-column table."""
    made = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for name, value in rows.items():
        made.add_row(name, str(value))
    console.print(made)
