"""What a run tells its loggers: the same stable names for csv, tensorboard and wandb, pictures and tables read back."""

import csv
import importlib.util
import json
import os
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from tc_lightning import callbacks
from tc_lightning.pixels import load_png

pytestmark = pytest.mark.xdist_group("loggers")  # one run for all

SMALL = [
    "lr_scheduler=constant",
    "optimizer.lr=1e-4",
    "max_steps=2",
    "checkpoint_every=2",
    "chain.steps=2",
    "schedule=last_k",
    "schedule.k=1",
    "val.prompts=4",
    "val.every=1",
    "prompts.train=16",
    "prompts.heldout=4",
    "prompts.batch_size=4",
    "trainer.log_every_n_steps=1",
    "callbacks=watched",
    "callbacks.hacking_watch.prompts=2",
    "callbacks.sample_grid.prompts=2",
    "callbacks.sample_grid.seeds=2",
    "callbacks.sample_grid.every=1",
    "+callbacks.throughput.every=1",
]
NAMES = {
    *("train/loss", "train/reward", "train/tiny_preference", "train/constraint", "train/grad_norm", "train/lr"),
    *("weight/tiny_preference", "weight/constraint"),
    *("val/total", "val/tiny_preference", "val/constraint"),
    *("watch/oracle", "watch/oracle_partial", "watch/held", "watch/trained", "watch/drop"),
    *("watch/diversity", "watch/saturation", "watch/text_drift"),
    *("perf/samples_per_second", "perf/peak_gib"),
    *(f"{when}/{name}" for when in ("before", "after", "gain") for name in ("total", "tiny_preference", "constraint", "oracle")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one short run with all three loggers."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    from tc_lightning.cli import main

    folder = tmp_path_factory.mktemp("loggers") / "run"
    patch = pytest.MonkeyPatch()
    for name, value in (("SILENT", "true"), ("MODE", "offline"), ("API_KEY", ""), ("DATA_DIR", "")):
        patch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"):  # none that another process's wandb uses at this moment
        patch.setenv(f"WANDB_{name}", str(tmp_path_factory.mktemp(name.lower())))
    for name in [name for name in os.environ if name.startswith(("WANDB_RUN", "WANDB_SERVICE", "WANDB_DIR", "WANDB__"))]:
        patch.delenv(name)
    settings = SMALL
    words = [
        *settings,
        "~callbacks.progress",
        "logger=[csv,tensorboard,wandb]",
        f"hydra.run.dir={folder}",
        "logger.wandb.tags=[try]",
        "logger.wandb.log_model=true",
    ]
    patch.setattr(sys, "argv", ["tc-lightning", "train", *words])
    GlobalHydra.instance().clear()
    try:
        main()
        import wandb

        wandb.finish()
    finally:
        patch.undo()
    return folder


@pytest.mark.full
def test_csv(trained):
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {name for row in rows for name, value in row.items() if value}
    assert found >= NAMES, NAMES - found
    assert [float(row["train/lr"]) for row in rows if row["train/lr"]] == pytest.approx([1e-4, 1e-4])


@pytest.mark.full
def test_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= NAMES, NAMES - set(tags["scalars"])
    assert {f"samples/{i}" for i in range(4)} <= set(tags["images"])
    assert [image.step for image in events.Images("samples/0")] == [0, 1, 2]


def records(folder):
    """Everything in an offline run's file: seven bytes, then records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768  # records do not cross blocks, their parts do not either
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def items(entries):
    return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


@pytest.mark.full
def test_the_checkpoint_is_an_artifact_when_asked(trained):
    found = [record.artifact for record in records(trained) if record.WhichOneof("record_type") == "artifact"]
    models = [artifact for artifact in found if artifact.type == "model"]
    assert models and "best" in [alias for artifact in models for alias in artifact.aliases]
    for artifact in models:
        (content,) = artifact.manifest.contents
        checkpoint = torch.load(content.local_path, weights_only=True)
        assert content.path == "model.ckpt" and all("text_encoder" in name for name in checkpoint["state_dict"])


@pytest.mark.full
def test_the_offline_wandb_run_holds_every_name_image_and_table(trained):
    found = list(records(trained))
    history = [items(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    names = {name for row in history for name in row}
    assert names >= NAMES, NAMES - names

    grids = [row for row in history if "samples.filenames" in row]
    assert [row["trainer/global_step"] for row in grids] == [0, 1, 2]
    (media,) = trained.glob("wandb/offline-run-*/files")
    for row in grids:
        assert row["samples.count"] == len(row["samples.captions"]) == 4
        assert all((media / name).is_file() for name in row["samples.filenames"])

    assert any("table/before_after.path" in row for row in history)
    artifacts = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "run_table"]
    files = {content.path: Path(content.local_path) for content in artifact.manifest.contents}
    assert all(file.is_relative_to(trained) for file in files.values())  # so that the folder can be uploaded from elsewhere
    content = json.loads(files["table/before_after.table.json"].read_text())
    assert content["columns"][:4] == ["prompt", "seed", "before", "after"]
    assert {"total before", "total after", "oracle before", "oracle after"} <= set(content["columns"])
    assert len(content["data"]) == 4
    assert content["data"][0][1].isdigit()
    for cell in (cell for row in content["data"] for cell in row[2:4]):
        assert (cell["_type"], cell["width"]) == ("image-file", 32)
        assert load_png(files[cell["path"]]).shape == (3, 32, 32)

    config = {}
    for record in found:
        if record.WhichOneof("record_type") == "config":
            config |= items(record.config.update)
        if record.WhichOneof("record_type") == "run":
            config |= items(record.run.config.update)
            assert list(record.run.tags) == ["try"]
    assert config["reward"]["tiny_preference"]["weight"] == 1.0
    assert {"git", "overrides", "chain", "backbone"} <= set(config)

    summary = {}  # what sweeps sort by
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert {"after/total", "gain/total", "gain/oracle", "watch/drop"} <= set(summary)


def test_without_a_key_a_run_is_offline_and_says_how_to_upload_it(monkeypatch, tmp_path, caplog):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    asked = {}
    monkeypatch.setattr(callbacks, "WandbLogger", lambda **options: (asked.clear(), asked.update(options)))
    said = []
    monkeypatch.setattr(callbacks, "rank_zero_info", said.append)

    callbacks.wandb_logger(save_dir="some")
    assert asked["mode"] == "offline"
    assert "wandb sync some/wandb/offline-run-*" in said[0]

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    callbacks.wandb_logger(log_model=True, save_dir="some")
    assert "mode" not in asked and asked["log_model"] is True
    monkeypatch.setenv("WANDB_MODE", "offline")
    callbacks.wandb_logger(save_dir="some")
    assert asked["mode"] == "offline"

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    callbacks.wandb_logger(save_dir="some")
    assert "mode" not in asked


def test_every_job_of_a_sweep_keeps_its_own_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(callbacks, "WandbLogger", lambda **options: None)
    monkeypatch.setattr(callbacks, "_DATA_DIR", {})
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    for job in ("0", "1"):
        callbacks.wandb_logger(offline=True, save_dir=tmp_path / job)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / job / "wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", "/a/users/own")
    callbacks.wandb_logger(offline=True, save_dir=tmp_path / "2")
    assert os.environ["WANDB_DATA_DIR"] == "/a/users/own"


def test_the_dashboard_shows_the_names_that_are_logged(root):
    pytest.importorskip("wandb_workspaces", reason="the script's own library is not installed")
    spec = importlib.util.spec_from_file_location("wandb_dashboard", root / "docs" / "wandb_dashboard.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    view = script.layout("someone", "some")._to_model().model_dump_json(by_alias=True)
    named = set(re.findall(r'"((?:train|val|watch|perf|gain)/[a-z_]+)"', view))
    assert named <= NAMES and len(named) > 10, named - NAMES
    assert '"samples"' in view and "table/before_after" in view


def test_without_wandb_the_message_says_what_to_install(monkeypatch):
    def missing(**options):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setattr(callbacks, "WandbLogger", missing)
    with pytest.raises(ValueError, match=r"pip install 'tc_lightning\[wandb\]'; or logger=\[csv\]"):
        callbacks.wandb_logger(offline=True)
