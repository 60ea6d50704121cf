"""The paper's tables: every row composes, what is missing is trained or named, rows are tested with their own settings."""

import csv
import json
import shlex
import subprocess
from pathlib import Path

import pytest
from small_runs import door, refused
from tuned_runs import make_run

from tc_lightning.cli import tables

CONF = Path(__file__).resolve().parent.parent / "conf"
TABLES = sorted(file.stem for file in (CONF / "table").glob("*.yaml"))
CHAIN = {"steps": 10, "guidance_scale": 1.5, "timestep_spacing": "trailing"}


def finished(folder, seed=0, **config):
    """A run folder that a table takes for its own."""
    folder.mkdir(parents=True)
    make_run(folder, seed)
    card = json.loads((folder / "run.json").read_text())
    card["config"] = {"chain": CHAIN, "reward": {"tiny_preference": {"weight": 1.0}}} | config
    (folder / "run.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("backbone", ["tiny", "sd15"])
@pytest.mark.parametrize("table", TABLES)
def test_every_run_of_a_table_composes(table, backbone, empty):
    more = ['train_with=["prompts.path=x.csv"]'] if backbone == "sd15" else []
    done = door("evaluate", f"table={table}", f"table.backbone={backbone}", *more)
    refused(done, "runs of this table are not there; train=true trains them", f"runs/tables/{backbone}/")
    commands = [shlex.split(line) for line in done.err.splitlines() if line.startswith("  python")]
    assert all(
        command[:4] == ["python", "-m", "tc_lightning", "train"] and f"backbone={backbone}" in command for command in commands
    )
    folders = [command[-1] for command in commands]
    assert len(set(folders)) == len(folders) > 0
    assert not list(empty.rglob("scores.csv"))


def test_a_run_that_two_tables_share_is_the_same_run():
    from omegaconf import OmegaConf

    seen = {}
    for table in TABLES:
        whole = OmegaConf.to_container(OmegaConf.load(CONF / "table" / f"{table}.yaml"), resolve=False)["table"]
        for backbone in ("tiny", "sd15"):
            for folder, job in tables._jobs(whole[backbone], backbone, Path(backbone), []).items():
                # preference is the default reward of tiny, as the three published ones are of sd15; 5 the default K
                usual = {"reward=[tiny_preference]", "reward=[hpsv2,aesthetic,pickscore]", "schedule.k=5"}
                assert seen.setdefault(folder, set(job) - usual) == set(job) - usual, (table, folder)


@pytest.mark.full
def test_rows_are_tested_with_their_own_settings(empty):
    place = empty / "runs" / "tables" / "tiny"
    for seed, name in enumerate(("k2", "k4", "k6", "preference")):
        finished(place / name, seed)
    done = door("evaluate", "table=table4", "bench.limit=1", "shown=1", "processes=1", "micro_batch=1", "reward=[tiny_clip]")
    assert done.status == 0, done.err
    with (place / "table4" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = {
        model: [row["tiny_clip"] for row in rows if row["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)
    }
    assert list(scores) == ["original", "2/2", "2/4", "2/6", "2/10", "4/4", "6/6", "10/10"]
    assert len({tuple(values) for values in scores.values()}) == 8  # one run under four windows gives four models
    assert "| 2/4 | " in (place / "table4" / "scores.md").read_text()
    trained = json.loads((place / "table4" / "scores.json").read_text())["trained_on"]
    assert trained["2/10"] == ["tiny_preference"]


def test_train_true_trains_what_is_missing(empty, monkeypatch):
    asked = []

    def run(command, check):
        asked.append(command)
        folder = Path(command[-1].removeprefix("hydra.run.dir="))
        finished(empty / folder) if "aesthetic" not in folder.name else None
        return subprocess.CompletedProcess(command, 3 if "aesthetic" in folder.name else 0)

    monkeypatch.setattr(tables.subprocess, "run", run)
    finished(empty / "runs" / "tables" / "tiny" / "all")
    order = "table.tiny.rows=[{name:original,run:base},{name:a,run:all},{name:b,run:preference},{name:c,run:aesthetic}]"
    done = door("evaluate", "table=table1", order, "train=true")
    refused(done, "the training of aesthetic ended with 3; alone it is: python -m tc_lightning train backbone=tiny")
    assert [command[-1] for command in asked] == [f"hydra.run.dir=runs/tables/tiny/{name}" for name in ("preference", "aesthetic")]
    assert "max_steps=100" in asked[0]


def test_an_interrupted_training_is_taken_up(empty):
    folder = finished(empty / "runs" / "tables" / "tiny" / "aesthetic")
    card = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(card | {"status": "interrupted"}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    refused(door("evaluate", "table=table1"), "hydra.run.dir=runs/tables/tiny/aesthetic ckpt_path=last")


def test_bad_settings(empty):
    finished(empty / "other" / "tiny" / "aesthetic", constraint={"constraint": {"weight": 7.0}})
    refused(door("evaluate", "table=table1", "runs=other"), "another run", "constraint.constraint.weight: 7.0, here 30.0", "runs=")
    refused(door("evaluate", "table=table1", "table.backbone=sd3"), "table.backbone=sd3: accepted are tiny, sd15")
    refused(door("evaluate", "table=table9"), "no table=table9: accepted are figure6, table1, table4, table5, table6")
    refused(door("evaluate", "table=table1", "table.tiny.train=[max_step=3]"), "max_step")
    refused(door("evaluate", "run=[{name:a}]"), "no run in an entry of run=")
    refused(door("evaluate", "run=[{run:tiny,schedulr:euler}]"), "schedulr in an entry of run=", "scheduler")
    refused(door("evaluate", "run=[{run:tiny,scheduler:heun}]"), "heun", "accepted: ddim, pndm")
