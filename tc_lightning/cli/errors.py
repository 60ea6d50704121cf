"""One clear message for a user's mistake, a whole traceback for ours."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator

TRACE = "HYDRA_FULL_ERROR"
OURS = "TC_LIGHTNING_SET_FULL_ERROR"  # told to child processes, which inherit the other one: the user did not ask for it


@contextlib.contextmanager
def raising_hydra() -> Iterator[bool]:
    """Hydra raises its errors instead of printing them; yields whether the user asked for whole tracebacks."""
    asked = os.environ.get(TRACE) == "1" and OURS not in os.environ
    if not asked:
        os.environ[TRACE] = os.environ[OURS] = "1"
    try:
        yield asked
    finally:
        for name in () if asked else (TRACE, OURS):
            os.environ.pop(name, None)


@contextlib.contextmanager
def plain_errors(verb: str, whole: bool = False) -> Iterator[None]:
    """Print a user's mistake as one message and exit with 2 (settings) or 1 (while running); `whole` lets all through."""
    try:
        yield
    except Exception as error:
        message, status = (None, 0) if whole else _mistake(error, verb)
        if message is None:
            raise
        print(f"error: {message.strip()}\n({TRACE}=1 shows the whole traceback)", file=sys.stderr)
        sys.exit(status)


def of_sweep(verb: str, whole: bool) -> contextlib.AbstractContextManager | None:
    """In a job that shares the sweep's process: its error is written to its run.json, and the sweep goes on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return _recorded(verb, whole) if HydraConfig.get().mode == RunMode.MULTIRUN else None


@contextlib.contextmanager
def _recorded(verb: str, whole: bool) -> Iterator[None]:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from tc_lightning.cli.record import write_failure

    given = HydraConfig.get()
    os.environ.setdefault("WANDB_RUN_GROUP", "/".join(Path(given.sweep.dir).resolve().parts[-2:]))
    try:
        yield
    except Exception as error:  # noqa: BLE001  whatever it is, it is written down and the other jobs go on
        message = _mistake(error, verb)[0]
        if whole or message is None:
            traceback.print_exc()
        message = message or f"{type(error).__name__}: {error}"
        write_failure(Path(given.runtime.output_dir), verb, list(given.overrides.task), message)
        print(f"error: job {given.job.num}: {message}", file=sys.stderr)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """A mistake met here is one of the settings: the exit status is 2."""
    try:
        yield
    except Exception as error:
        error.exit_status = 2
        raise


def _mistake(error: Exception, verb: str) -> tuple[str | None, int]:
    """What to say of a user's mistake and the exit status; None for an error that is no user's."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InstantiationException):
        # of an object that is built from settings, a wrong type is a setting's too
        if not isinstance(error.__cause__, (*_mistakes(), TypeError, OmegaConfBaseException)):
            return None, 1
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{_missing(error.__cause__)}" + (f"\n(in key {key.group(1)})" if key else ""), 2
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain(error, verb), 2
    status = getattr(error, "exit_status", 1)
    return (str(error), status) if isinstance(error, _mistakes()) else (None, status)


def _mistakes() -> tuple[type[Exception], ...]:
    known: tuple[type[Exception], ...] = (ValueError, OSError, FloatingPointError, MemoryError)
    lightning = sys.modules.get("lightning_fabric.utilities.exceptions")
    return (*known, lightning.MisconfigurationException) if lightning else known


def _explain(error: Exception, verb: str) -> str:
    message = str(error)
    option = re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", message)
    if option:
        return _unknown_option(*option.groups())
    if (word := getattr(error, "override", None)) and word not in message:  # Hydra's parser names the bad letter only
        return f"override {word!r}: {message}"
    key = re.search(r"Could not override '([^']+)'", message)
    return _unknown_key(key.group(1), verb) if key else _missing(error)


def _missing(error: BaseException) -> str:
    absent = re.match(r"Missing mandatory value: (\S+)", str(error))
    return f"{absent.group(1)} must be given: {absent.group(1)}=..." if absent else str(error)


def _unknown_option(group: str, option: str) -> str:
    from tc_lightning.cli import conf_folder

    options = sorted(file.stem for file in (conf_folder() / group).glob("*.yaml"))
    return f"no {group}={option}: accepted are {', '.join(options) or 'none'}.{_hint(option, options, 1)}"


def _unknown_key(key: str, verb: str) -> str:
    return (
        f"no key {key!r} in the settings of {verb}.{_hint(key, _keys(verb), 3)} "
        f"`python -m tc_lightning {verb} --cfg job` shows all keys."
    )


def _hint(word: str, words: list[str], count: int) -> str:
    close = difflib.get_close_matches(word, words, n=count, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else ""


def _keys(verb: str) -> list[str]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from tc_lightning.cli import conf_folder

    # with the groups that the user chose: prompts=file has other keys than prompts=shapes
    chosen = [word for word in sys.argv[2:] if re.fullmatch(r"[a-z_]+=\S+", word) and (conf_folder() / word.split("=")[0]).is_dir()]
    found: list[str] = []
    with initialize_config_dir(str(conf_folder()), version_base=None):
        try:
            cfg = compose(verb, overrides=chosen)
        except HydraException:  # a second mistake: the defaults will do for a hint
            cfg = compose(verb)
        _walk(OmegaConf.to_container(cfg, resolve=False), "", found)
    return found


def _walk(node: object, prefix: str, found: list[str]) -> None:
    for key, value in node.items() if isinstance(node, dict) else ():
        found.append(f"{prefix}{key}")
        _walk(value, f"{prefix}{key}.", found)
