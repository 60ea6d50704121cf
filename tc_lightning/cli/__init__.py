"""Verbs: each takes Hydra overrides, builds plain objects and calls the library. Heavy imports wait for the work."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

VERBS = {
    "train": "fine-tune a model against rewards",
    "evaluate": "score and compare models on a bench",
    "generate": "make images of prompts",
    "mix": "interpolate and mix tuned text encoders",
    "export": "write a tuned model for other tools",
    "prefix": "fill the cache of the steps before the gradient ahead of time",
    "app": "the mixing page, on this machine",
    "rate": "blind human comparison of models",
    "pretrain": "make the embedded model again from nothing",
}

USAGE = """tc_lightning fine-tunes text-to-image models against rewards (TextCraftor).

usage: python -m tc_lightning <verb> [key=value ...]

{verbs}

  python -m tc_lightning train                    the main job: the embedded model, a few minutes on a CPU
  python -m tc_lightning train --help             what can be set
  python -m tc_lightning train --cfg job          the composed settings, without running
"""


def conf_folder() -> Path:
    """The folder of yaml files: of the installed package, or beside it in a checkout that is not installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ in {package} or beside it: the installation is incomplete")


def main() -> None:
    """Run the verb that the command line names; sys.argv stays as it is, because Lightning's child processes repeat it."""
    arguments = sys.argv[1:]
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(USAGE.format(verbs="\n".join(f"  {name:10} {what}" for name, what in VERBS.items())))
        return
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS)
        hint = f" Did you mean {close[0]}?" if close else ""
        sys.exit(f"unknown verb {verb!r}: accepted are {', '.join(VERBS)}.{hint}")
    _run(verb, arguments[1:])


def _run(verb: str, arguments: list[str]) -> None:
    # hydra.main would read sys.argv with the verb in it; this is what it calls.
    from hydra import version
    from hydra._internal.utils import _run_hydra, get_args_parser

    from tc_lightning.cli.errors import plain_errors, raising_hydra
    from tc_lightning.cli.record import refuse_secrets
    from tc_lightning.cli.rerun import expand
    from tc_lightning.sweep import end_with_parent, register

    version.setbase("1.3")
    register()
    end_with_parent()
    parser = get_args_parser()
    with raising_hydra() as whole, plain_errors(verb, whole):
        refuse_secrets(arguments)
        given = parser.parse_args(arguments)
        if verb == "train":
            given.overrides = expand(given.overrides)

        def task(cfg: Any) -> Any:
            from tc_lightning.cli.errors import of_sweep

            shared = of_sweep(verb, whole)
            # here already, for Hydra prints the overrides above an error that it sees
            with shared or plain_errors(verb, whole):
                done = importlib.import_module(f"tc_lightning.cli.{verb}").run(cfg)
                return done.get("objective") if shared and isinstance(done, dict) else done
            return None  # a job that failed, to a sweeper

        _run_hydra(
            args=given,
            args_parser=parser,
            task_function=task,
            config_path=str(conf_folder()),
            config_name=verb,
        )
