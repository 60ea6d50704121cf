"""What a user installs: declared dependencies, pins inside the ranges, a wheel that is complete and works elsewhere."""

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def config(root):
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def imported_packages(folder: Path) -> set[str]:
    """Top-level names that the .py files of a folder import from elsewhere, lazily imported ones included."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"tc_lightning"}


def test_every_import_is_declared(root, config):
    declared = set(requirements(config["options"]["install_requires"]))
    for extra in ("wandb", "app", "data", "sweep"):
        declared |= set(requirements(config["options.extras_require"][extra]))
    installed = packages_distributions()
    undeclared = {
        name
        for name in imported_packages(root / "tc_lightning")
        if not {canonicalize_name(d) for d in installed.get(name, [name])} & declared
    }
    assert undeclared == set()


def test_pins_lie_in_the_ranges_and_cover_core_and_dev(root, config):
    pins = requirements((root / "requirements.txt").read_text(encoding="utf-8"))
    ranges = requirements(config["options"]["install_requires"])
    ranges |= requirements(config["options.extras_require"]["dev"])
    assert set(pins) == set(ranges)
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{name} is not pinned exactly"
        assert ranges[name].specifier.contains(specifier.version), f"{pin} is outside {ranges[name]}"


def test_every_package_is_listed(root, config):
    folders = {file.parent.relative_to(root) for file in (root / "tc_lightning").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(config["options"]["packages"].split()) == packages | {"tc_lightning.conf"}


def source_files(root: Path) -> list[Path]:
    """Files of the checkout, as git sees them; relative to root."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: nothing to compare the wheel with")
    return [Path(name) for name in sorted(set(done.stdout.split("\0"))) if name and (root / name).is_file()]


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    """Built from a copy: a stale build/ beside the sources would put deleted files into the wheel."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in source_files(root):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, copy / file)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, cwd=out, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, cwd=target, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def belongs_in_the_wheel(file: Path) -> bool:
    if file.parts[0] == "conf":
        return file.suffix in (".yaml", ".py")
    if file.parts[0] != "tc_lightning":
        return False
    return file.suffix == ".py" or file.name == "py.typed" or file.parts[1:3] == ("tiny", "weights")


EVERY_VERB = """
import sys
from tc_lightning.cli import VERBS, main

def door(*words):
    sys.argv = ["tc-lightning", *words]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code

for verb in VERBS:
    door(verb, "--help")
    door(verb, *{"export": ["run=tiny"], "rate": ["run=[tiny]"]}.get(verb, []), "--cfg", "job")
    print("found", verb)
door("train", "--cfg", "hydra")
door("generate", "text=a red circle", "seeds=[0]", "chain.steps=1", "hydra.run.dir=out")
"""


@pytest.mark.full
@pytest.mark.xdist_group("wheel")
class TestWheel:
    def test_holds_the_tree(self, wheel, root):
        expected = {
            file.as_posix() if file.parts[0] == "tc_lightning" else f"tc_lightning/{file.as_posix()}"
            for file in source_files(root)
            if belongs_in_the_wheel(file)
        }
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        held = {name for name in names if ".dist-info/" not in name}
        assert any(name.startswith("tc_lightning/conf/backbone/") for name in expected)
        assert any(name.startswith("tc_lightning/tiny/weights/") for name in expected)
        assert expected - held == set(), "in the tree, not in the wheel: see packages and package_data in setup.cfg"
        assert held - expected == set(), "in the wheel, not in the tree"
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    def test_size(self, wheel):
        assert wheel.stat().st_size < 20e6, "bytes; the embedded model is to stay under 15 MB"

    def test_imports_come_from_the_wheel(self, installed, run_python):
        code = "import tc_lightning as a, tc_lightning.conf as b; print(a.__file__); print(b.__file__)"
        done = run_python("-c", code, path=[installed])
        assert done.returncode == 0, done.stderr
        package = installed.resolve() / "tc_lightning"
        found = [Path(line).resolve() for line in done.stdout.split("\n") if line]
        assert found == [package / "__init__.py", package / "conf" / "__init__.py"]

    def test_finds_its_configuration(self, installed, run_python):
        done = run_python("-m", "tc_lightning", "train", "--cfg", "job", path=[installed])
        assert done.returncode == 0, done.stderr
        assert "backbone:" in done.stdout

    def test_finds_the_embedded_model(self, installed, run_python):
        code = (
            "import tc_lightning as tc; b = tc.Backbone.load('tiny')\n"
            "print(tc.__file__, sum(p.numel() for p in b.text_encoder.parameters()), b.unet is not None)"
        )
        done = run_python("-c", code, path=[installed])
        assert done.returncode == 0, done.stderr
        file, parameters, unet = done.stdout.split()[-3:]
        assert Path(file).resolve().is_relative_to(installed.resolve())
        assert int(parameters) > 0 and unet == "True"

    def test_every_verb_finds_its_settings_and_one_makes_an_image(self, installed, run_python):
        """From another folder, with nothing of the checkout on the path; the launcher of sweeps comes along."""
        done = run_python("-c", EVERY_VERB, path=[installed])
        assert done.returncode == 0, done.stderr
        from tc_lightning.cli import VERBS

        assert [line[6:] for line in done.stdout.splitlines() if line.startswith("found ")] == list(VERBS)
        assert "hydra_plugins.tc_lightning.PoolLauncher" in done.stdout and "1 image" in done.stdout

    def test_holds_the_tuned_text_encoders_and_stays_small(self, installed, run_python, tmp_path):
        weights = installed / "tc_lightning" / "tiny" / "weights"
        assert sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) < 15e6, "bytes"
        code = (
            "import torch, tc_lightning as tc; from tc_lightning.backbone import shipped\n"
            "found = {name: tc.Backbone.load(name).encode(['a circle']) for name in ['tiny', *shipped()]}\n"
            "assert all(torch.isfinite(e).all() for e in found.values())\n"
            "print(*shipped(), len({float(e.sum()) for e in found.values()}))"
        )
        done = run_python("-c", code, path=[installed])
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-4:] == ["tiny:aesthetic", "tiny:clip", "tiny:preference", "4"]
