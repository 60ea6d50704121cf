"""One clear message for a user's mistake, a whole traceback for ours."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator

TRACE = "HYDRA_FULL_ERROR"
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, FloatingPointError)


@contextlib.contextmanager
def plain_errors(verb: str, arguments: list[str]) -> Iterator[None]:
    """Print a user's mistake as one message and exit with 2 (settings) or 1 (while running); HYDRA_FULL_ERROR=1 shows all."""
    if os.environ.get(TRACE) == "1":
        yield
        return
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    os.environ[TRACE] = "1"  # Hydra then raises instead of printing
    try:
        yield
    except InstantiationException as error:
        if not isinstance(error.__cause__, (*MISTAKES, OmegaConfBaseException)):
            raise
        _end(f"{error.__cause__}\n(in {_last_line(error)})", 2)
    except (HydraException, OmegaConfBaseException) as error:
        _end(_explain(str(error.__cause__ or error), str(error), verb), 2)
    except MISTAKES as error:
        _end(str(error), 1)
    finally:
        os.environ.pop(TRACE, None)


def _end(message: str, status: int) -> None:
    print(f"error: {message.strip()}", file=sys.stderr)
    print(f"({TRACE}=1 shows the whole traceback)", file=sys.stderr)
    sys.exit(status)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].replace("full_key: ", "key ")


def _explain(cause: str, message: str, verb: str) -> str:
    named = re.search(r"Could not override '([^']+)'", message)
    if not named:
        return message
    key = named.group(1)
    close = difflib.get_close_matches(key, _keys(verb), n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return f"no key {key!r} in the settings of {verb}.{hint} `python -m tc_lightning {verb} --cfg job` shows all keys."


def _keys(verb: str) -> list[str]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from tc_lightning.cli import conf_folder

    with initialize_config_dir(str(conf_folder()), version_base=None):
        found: list[str] = []
        _walk(OmegaConf.to_container(compose(verb), resolve=False), "", found)
    return found


def _walk(node: object, prefix: str, found: list[str]) -> None:
    for key, value in node.items() if isinstance(node, dict) else ():
        found.append(f"{prefix}{key}")
        _walk(value, f"{prefix}{key}.", found)
