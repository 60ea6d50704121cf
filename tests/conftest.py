"""What every test finds: no network, no display, the checkout's path and a way to run commands as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch or a hub library is imported, and inherited by every command a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each worker would otherwise take every core

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def run_python(tmp_path):
    """`run_python("-m", "tc_lightning", "train", path=[folder])` -> CompletedProcess, run in an empty folder.

    `path` leads PYTHONPATH and is the checkout by default. stdin is closed; stdout and stderr are text.
    """

    def run(*arguments: str, path=(ROOT,), cwd=None, timeout=240) -> subprocess.CompletedProcess:
        folder = Path(cwd or tmp_path / "elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
