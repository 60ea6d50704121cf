"""The doors open at once: no heavy library is imported before there is work for it (asserted through sys.modules)."""

import pytest

HEAVY = {
    "torch",
    "transformers",
    "diffusers",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "torchmetrics",
    "peft",
    "scipy",
    "matplotlib",
    "wandb",
    "gradio",
}

# Python imports a sitecustomize by itself at the start, so the command under test is exactly what a user types.
WRITE_MODULES_AT_EXIT = """
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path({target!r}).write_text("\\n".join(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import tc_lightning"),
        ("-c", "import tc_lightning; dir(tc_lightning); tc_lightning.__doc__"),
        ("-m", "tc_lightning", "--help"),
        ("-m", "tc_lightning", "train", "--help"),
        ("-m", "tc_lightning", "train", "--cfg", "job"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_nothing_heavy_is_imported(arguments, run_python, root, tmp_path):
    record, hook = tmp_path / "modules.txt", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WRITE_MODULES_AT_EXIT.format(target=str(record)))

    done = run_python(*arguments, path=[hook, root])

    assert done.returncode == 0, done.stderr
    modules = record.read_text().split()
    assert "tc_lightning" in modules
    assert HEAVY & {name.partition(".")[0] for name in modules} == set()


def test_a_dry_run_writes_nothing(run_python, tmp_path):
    done = run_python("-m", "tc_lightning", "train", "--cfg", "job", cwd=tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert "backbone:" in done.stdout
    assert list((tmp_path / "empty").iterdir()) == []
