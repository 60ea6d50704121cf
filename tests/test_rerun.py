"""rerun=<run folder>, the deterministic trace of losses, and what never gets into a run's files."""

import csv
import json
import os
import re

import pytest
from small_runs import SMALL, door, kept, refused, train

from tc_lightning.cli import record
from tc_lightning.cli.rerun import expand, say_differences

SECRET = "hf_" + "x7" * 17


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture
def first(tmp_path_factory):
    return kept(tmp_path_factory.getbasetemp() / "to_run_again", "seed=3", "ckpt_path=null")


@pytest.mark.full
def test_a_run_again_is_the_same_run_and_says_what_differs(first, tmp_path):
    """The trace of losses of the embedded model, to the last digit, with nothing given but the folder."""
    done = door("train", f"rerun={first}", f"hydra.run.dir={tmp_path / 'again'}")
    assert done.status == 0, done.err
    assert f"again {first}" in done.out and len(losses(first)) == 2
    said = done.out.partition(f"again {first}")[2].splitlines()[1:]
    assert not any(re.match(r"  (?!git: )\S+: .* -> ", line) for line in said)  # a commit may come while tests run
    assert losses(tmp_path / "again") == losses(first)
    one, two = (json.loads((folder / "run.json").read_text()) for folder in (first, tmp_path / "again"))
    assert one["metrics"] == two["metrics"] and one["hashes"] == two["hashes"]
    other = door("train", f"rerun={first}", "seed=4", "max_steps=1", f"hydra.run.dir={tmp_path / 'other'}")
    assert other.status == 0, other.err
    assert "but for" in other.out and "  seed: 3 -> 4\n" in other.out and "  max_steps: 2 -> 1\n" in other.out


def run_json(folder, **content):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content))
    return folder


def test_overrides_come_first_and_how_a_run_begins_is_not_repeated(tmp_path):
    folder = run_json(tmp_path / "run", verb="train", overrides=["seed=1", "ckpt_path=last", "rerun=older", "+callbacks.a=1"])
    assert expand(["max_steps=3", f"rerun={folder}", "seed=2"]) == [
        "seed=1",
        "+callbacks.a=1",
        "max_steps=3",
        f"rerun={folder}",
        "seed=2",
    ]
    assert expand(["max_steps=3"]) == ["max_steps=3"] and expand(["rerun=null"]) == ["rerun=null"]


def test_differences_in_settings_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "git_commit", lambda: "b" * 40)
    folder = run_json(
        tmp_path / "run",
        verb="train",
        config={"chain": {"steps": 3}, "gone": 1, "logger": {"csv": {"save_dir": "there"}}},
        versions={**record.versions(), "torch": "1.0"},
        git="a" * 40,
        overrides=[],
    )
    said = say_differences({"chain": {"steps": 4}, "seed": 0, "logger": {"csv": {"save_dir": "here"}}}, folder)
    assert said[:3] == ["chain.steps: 3 -> 4", "gone: 1 -> not set", "seed: not set -> 0"]
    assert said[3].startswith("torch: 1.0 -> ") and said[4] == f"git: {'a' * 40} -> {'b' * 40}" and len(said) == 5


@pytest.mark.parametrize("content", [None, "{", "[]", '{"verb": "mix", "overrides": []}', '{"verb": "train"}'])
def test_what_cannot_be_run_again_is_one_clear_error(content, tmp_path):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "run.json").write_text(content)
    refused(door("train", f"rerun={tmp_path / 'run'}"), f"rerun={tmp_path / 'run'}: ")


@pytest.mark.parametrize(
    "word", [f"+logger.csv.api_key={SECRET}", "+hub.token=abc", "+a.password=p", f"backbone.source={SECRET}", f"+x={SECRET}y"]
)
def test_an_override_that_holds_a_secret_is_refused_before_anything_is_written(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    done = door("train", *SMALL, word)
    refused(done, "holds a secret", "set it in the environment")
    assert SECRET not in done.out + done.err and not list(tmp_path.iterdir())


def test_settings_that_only_sound_like_secrets_are_taken():
    record.refuse_secrets(["reward.hpsv2.tokenizer=x", "+a.token=null", "prompts.column=keyword", "monkey=1"])


@pytest.mark.full
def test_no_file_of_a_run_holds_a_secret_of_the_environment(tmp_path, monkeypatch):
    """Also one that a setting takes in by interpolation, and one that an error message repeats."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    card = train(tmp_path / "run", "+prompts_note=${oc.env:HF_TOKEN}", "max_steps=1")
    assert card["config"]["prompts_note"] == "***"
    holding = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert holding == [] and os.environ["HF_TOKEN"] == SECRET
