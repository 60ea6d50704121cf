"""A checkpoint file is whole or the old one: full disks, broken disks, foreign files, what a checkpoint says of its run."""

import json
import os
import pickle
import resource

import pytest
import torch
from small_runs import SMALL, door, kept, refused, train

from tc_lightning import checkpoint_io
from tc_lightning.checkpoint_io import VerifiedCheckpointIO, previous, read_checkpoint
from tc_lightning.provenance import hash_network, hash_prompts


def checkpoint(number):
    return {
        "state_dict": {"weight": torch.full((1000,), float(number))},
        "optimizer_states": [],
        "global_step": number,
        "loops": {},
    }


def step(path):
    return read_checkpoint(path)["global_step"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of step 1 at checkpoints/last.ckpt."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    VerifiedCheckpointIO().save_checkpoint(checkpoint(1), path)
    return path


def test_the_new_one_takes_the_place_and_the_old_one_is_kept(saved):
    assert step(saved) == 1 and not previous(saved).exists()
    for number in (2, 3):
        VerifiedCheckpointIO().save_checkpoint(checkpoint(number), saved)
        assert (step(saved), step(previous(saved))) == (number, number - 1)
    assert sorted(file.name for file in saved.parent.iterdir()) == ["last.ckpt", "last.previous.ckpt"]
    assert VerifiedCheckpointIO().load_checkpoint(saved, weights_only=True)["global_step"] == 3
    VerifiedCheckpointIO().remove_checkpoint(saved)
    assert not list(saved.parent.iterdir())


def test_at_no_moment_is_there_no_whole_file(saved, monkeypatch):
    """Looked at before and after every call that changes a name."""
    seen = []

    def watched(call):
        def watched_call(*arguments):
            seen.append(step(saved))
            call(*arguments)
            seen.append(step(saved))

        return watched_call

    for name in ("replace", "link", "fsync"):
        monkeypatch.setattr(checkpoint_io.os, name, watched(getattr(os, name)))
    VerifiedCheckpointIO().save_checkpoint(checkpoint(2), saved)
    assert len(seen) >= 8 and seen == sorted(seen) and set(seen) == {1, 2}


def test_a_full_disk_leaves_the_old_one(saved):
    """The kernel refuses what exceeds the limit of a file's size, in the middle of the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"last.ckpt was not written \(.*\); .*last.ckpt of before is untouched"):
            VerifiedCheckpointIO().save_checkpoint(checkpoint(2), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert step(saved) == 1 and [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


def test_bytes_that_come_back_otherwise_are_not_put_in_place(saved, monkeypatch):
    write = checkpoint_io._write

    def broken_disk(held, part):
        digest = write(held, part)
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        return digest

    monkeypatch.setattr(checkpoint_io, "_write", broken_disk)
    with pytest.raises(OSError, match="read back otherwise than written"):
        VerifiedCheckpointIO().save_checkpoint(checkpoint(2), saved)
    assert step(saved) == 1 and [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


class Code:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable checkpoint"),
        (b"not a checkpoint", "no readable checkpoint"),
        (pickle.dumps(Code()), "no readable checkpoint"),
        (None, "no readable checkpoint"),  # cut in the middle
        ({"weight": torch.zeros(2)}, "is no training checkpoint: it holds no state_dict, optimizer_states, global_step, loops"),
        ([1, 2], "is no training checkpoint"),
    ],
    ids=["empty", "text", "code", "cut", "weights", "list"],
)
def test_what_is_no_checkpoint_is_refused(content, message, saved, tmp_path):
    path = tmp_path / "other.ckpt"
    if content is None:
        path.write_bytes(saved.read_bytes()[:-100])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


SHORT = ("prompts.train=6", "checkpoint_every=1", "max_steps=2")


@pytest.fixture
def finished(tmp_path_factory):
    return kept(tmp_path_factory.getbasetemp() / "checkpointed", *SHORT)


@pytest.mark.full
def test_a_run_keeps_two_and_says_in_both_what_it_was_made_of(finished):
    card = json.loads((finished / "run.json").read_text())
    assert card["skipped_steps"] == 0
    held = [read_checkpoint(finished / "checkpoints" / name)["run"] for name in ("last.ckpt", "last.previous.ckpt")]
    assert held[0] == held[1] == {key: card[key] for key in ("config", "overrides", "versions", "git", "hashes")}
    assert len(card["hashes"]["prompts"]) == 16
    networks = card["hashes"]["networks"]
    assert {"text_encoder", "vae", "unet", "reward.tiny_preference", "constraint.constraint"} <= set(networks)

    import tc_lightning as tc

    assert networks["unet"] == hash_network(tc.Backbone.load("tiny").unet)


def test_hashes_see_every_value_name_and_order():
    network = torch.nn.Linear(2, 2)
    before = hash_network(network)
    assert before == hash_network(network)
    with torch.no_grad():
        network.weight[1, 1] += 1e-6
    assert hash_network(network) != before
    with torch.no_grad():
        network.bias[0], network.bias[1] = 1.0, 2.0
    assert hash_prompts({"train": ["a", "b"]}) != hash_prompts({"train": ["b", "a"]}) != hash_prompts({"dev": ["b", "a"]})


@pytest.mark.full
def test_a_last_checkpoint_that_is_broken_is_passed_over_for_the_one_before(finished, tmp_path):
    import shutil

    run = shutil.copytree(finished, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    done = door("train", *SMALL, *SHORT, "max_steps=3", "seed=0", "ckpt_path=last", f"hydra.run.dir={run}")
    assert done.status == 0, done.err
    assert "no readable checkpoint" in done.out and "resuming from the one before it" in done.out
    assert step(last) == 3


@pytest.mark.full
def test_a_resumed_run_of_other_prompts_says_so(finished, tmp_path):
    import shutil

    run = shutil.copytree(finished, tmp_path / "run")
    with pytest.warns(UserWarning, match="made of something else until here: the prompts changed"):
        train(run, *SHORT, "prompts.train=8", "max_steps=3", "ckpt_path=last")


def test_a_checkpoint_that_is_none_is_one_clear_error(tmp_path):
    path = tmp_path / "foreign.ckpt"
    path.write_bytes(b"PK\x03\x04")
    refused(door("train", *SMALL, f"ckpt_path={path}", f"hydra.run.dir={tmp_path / 'run'}"), "no readable checkpoint", str(path))
