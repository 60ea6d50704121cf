"""The commands as a user types them: what they write, print and refuse."""

import csv
import json
import os
import re
import shutil

import pytest
import torch
from small_runs import SMALL, door, kept, refused, train

CHAIN = ("chain.steps=3", "chain.guidance_scale=4.0")
ROWS = "\n".join(f"a red circle number {index}" for index in range(20))


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def finished(tmp_path_factory):
    """A finished run folder, shared; leave it as it is."""
    return kept(tmp_path_factory.getbasetemp() / "finished")


@pytest.mark.full
def test_a_run_folder_holds_what_is_promised(finished):
    card = json.loads((finished / "run.json").read_text())
    assert (card["verb"], card["status"], card["samples"], card["steps"], card["device"]) == ("train", "finished", 4, 2, "cpu")
    assert card["seconds"] > 0 and "max_steps=2" in card["overrides"] and set(card["versions"]) >= {"python", "torch", "diffusers"}
    assert {name: split["prompts"] for name, split in card["splits"].items()} == {"train": 8, "dev": 2, "heldout": 4}
    names = {"total", "tiny_preference", "constraint", "oracle", "oracle_partial"}
    assert set(card["metrics"]) == {"before", "after"}
    assert all(set(scores) == names for scores in card["metrics"].values())
    for place in ("text_encoder/config.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "samples/before_after.png"):
        assert (finished / place).is_file(), place
    assert [f.name for f in sorted((finished / "samples").glob("step_*"))] == ["step_000000.png", "step_000002.png"]


@pytest.mark.full
def test_scores_of_a_run_are_a_row_an_image(finished):
    with (finished / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    card = json.loads((finished / "run.json").read_text())
    for model in ("before", "after"):
        mine = [row for row in rows if row["model"] == model]
        assert len({row["prompt"] for row in mine}) == 4
        mean = sum(float(row["total"]) for row in mine) / 4
        assert mean == pytest.approx(card["metrics"][model]["total"])
    assert [row["seed"] for row in rows[:4]] == [row["seed"] for row in rows[4:]]


@pytest.mark.full
def test_metrics_have_a_row_a_logged_step(finished):
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert list(losses) == [0, 1]
    assert {"train/reward", "train/constraint", "train/tiny_preference", "train/grad_norm", "val/total", "watch/oracle"} <= set(
        rows[0]
    )
    assert any(row["before/total"] for row in rows) and any(row["after/total"] for row in rows)


@pytest.mark.full
def test_a_checkpoint_holds_what_learns_and_no_more(finished):
    import tc_lightning as tc

    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    names = {f"backbone.text_encoder.{name}" for name, _ in tc.Backbone.load("tiny").text_encoder.named_parameters()}
    assert set(checkpoint["state_dict"]) == names and checkpoint["global_step"] == 2
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(names)


@pytest.mark.full
def test_tuned_weights_are_those_of_the_checkpoint_and_every_transformers_reads_them(finished):
    from safetensors.torch import load_file

    saved = load_file(finished / "text_encoder" / "model.safetensors")
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("text_model.") for key in saved)
    bare = {key.removeprefix("backbone.text_encoder.").removeprefix("text_model."): value for key, value in checkpoint.items()}
    assert all(torch.equal(saved[f"text_model.{key}"], value) for key, value in bare.items())


@pytest.mark.full
def test_generate_writes_an_image_a_prompt_and_seed(finished, empty):
    done = door("generate", f"run=[tiny,{finished}]", 'text=["a red circle","a blue cross"]', "seeds=[3,4]", "hydra.run.dir=out")
    assert done.status == 0, done.err
    assert "8 images in" in done.out and "grid.png" in done.out
    for place in ("0_tiny", "1_finished"):
        names = sorted(file.name for file in (empty / "out" / place).iterdir())
        assert names == ["0000_3.png", "0000_4.png", "0001_3.png", "0001_4.png"]
    assert (empty / "out" / "grid.png").is_file()
    assert json.loads((empty / "out" / "run.json").read_text())["seeds"] == [3, 4]


@pytest.mark.full
def test_generate_samples_a_run_as_it_was_trained(finished, empty):
    """Chain and guidance of the run; an image is that of tc.generate, whatever the batch."""
    import numpy as np
    from PIL import Image

    import tc_lightning as tc

    done = door("generate", f"run={finished}", "text=a red circle", "seeds=[7,8,9]", "batch_size=2", "hydra.run.dir=out")
    assert done.status == 0, done.err
    expected = tc.generate(tc.Backbone.load(finished), ["a red circle"], [9], steps=3, guidance_scale=4.0)[0]
    pixels = np.array(Image.open(empty / "out" / "images" / "0000_9.png"))
    assert np.abs(pixels - 255 * expected.permute(1, 2, 0).numpy()).max() < 2


@pytest.mark.full
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_generate_takes_the_tuned_window_from_the_command(fraction, finished, empty):
    """tuned_fraction=0 is the base model; the original text encoder is that of the run's base."""
    for number, run in enumerate((finished, "tiny")):
        done = door(
            "generate",
            f"run={run}",
            "text=a red circle",
            "seeds=1",
            f"tuned_fraction={fraction}",
            f"hydra.run.dir={number}",
            *CHAIN,
        )
        assert done.status == 0, done.err
    images = [(empty / str(number) / "images" / "0000_1.png").read_bytes() for number in range(2)]
    assert (images[0] == images[1]) == (fraction == 0.0)


def test_generate_reads_prompts_of_a_file(empty):
    (empty / "prompts.txt").write_text("a red circle\na blue cross\na cyan square\n")
    chain = ("chain.steps=2", "seeds=[0]", "hydra.run.dir=out")
    done = door("generate", "prompts=file", "prompts.path=prompts.txt", "prompts.limit=2", *chain)
    assert done.status == 0 and "2 images" in done.out, done.err
    refused(door("generate", "prompts=file", "prompts.path=prompts.txt", *chain), "holds a run already")


@pytest.mark.full
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_else_is_tuned_is_exported_and_comes_back(mode, empty):
    """LoRA adapters in lora/, a UNet in unet/; a run folder samples as the module did at its end."""
    import tc_lightning as tc

    overrides = (f"tune.text_encoder={'lora' if mode == 'lora' else 'frozen'}", f"tune.unet={mode}", "optimizer.lr=0.01")
    card = train(empty / "run", *overrides, "tune.rank=2")
    assert card["config"]["tune"]["rank"] == 2
    files = {str(f.relative_to(empty / "run")) for f in (empty / "run").rglob("*.safetensors")}
    adapters = {f"lora/{part}/adapter_model.safetensors" for part in ("text_encoder", "unet")}
    assert files == (adapters if mode == "lora" else {"unet/diffusion_pytorch_model.safetensors"})
    state = torch.load(empty / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    live = tc.Backbone.load("tiny").tune("lora" if mode == "lora" else "frozen", mode, rank=2)
    live.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()}, strict=False)
    again, base = tc.Backbone.load(empty / "run"), tc.Backbone.load("tiny")
    images = [tc.generate(model, ["a red circle"], [1], steps=3, guidance_scale=4.0) for model in (live, again, base)]
    assert torch.allclose(images[0], images[1], atol=1e-4) and not torch.allclose(images[0], images[2], atol=1e-3)


@pytest.mark.full
def test_a_run_begins_where_another_ended(finished, empty):
    """backbone.source=<run folder>; the new run's base is the old run, also for its early steps."""
    import tc_lightning as tc

    card = train(empty / "second", f"backbone.source={finished}", "tuned_fraction=0.5")
    assert card["backbone"]["run"] == str(finished)
    first, second = (tc.Backbone.load(folder).text_encoder.state_dict() for folder in (finished, empty / "second"))
    assert not all(torch.equal(first[key], second[key]) for key in first)
    for fraction, run in ((0.0, empty / "second"), (1.0, finished)):
        words = ("text=a red circle", "seeds=1", f"tuned_fraction={fraction}", f"hydra.run.dir={run.name}_image")
        done = door("generate", f"run={run}", *words)
        assert done.status == 0, done.err
    images = [(empty / f"{name}_image" / "images" / "0000_1.png").read_bytes() for name in ("second", finished.name)]
    assert images[0] == images[1]


def test_no_prompt_text_is_lost_that_is_too_long(empty):
    long = "a red circle " * 20
    (empty / "prompts.txt").write_text("\n".join(f"{long} {n}" if n % 2 else f"a red circle {n}" for n in range(12)))
    files = ("prompts=file", "prompts.path=prompts.txt", "prompts.dev=2", "prompts.heldout=2")
    small = (
        "max_steps=1",
        "chain.steps=2",
        "schedule=last_k",
        "schedule.k=1",
        "prompts.batch_size=2",
        "watch=none",
        "val.every=0",
        "~callbacks",
    )
    with pytest.warns(UserWarning, match=r"\d of 8 prompts have more than 32 tokens: the tokenizer cuts them") as caught:
        done = door("train", *small, *files, "hydra.run.dir=out")
    assert done.status == 0, done.err
    assert sum("tokens" in str(warning.message) for warning in caught) == 1


TRAIN = ("train", "max_steps=1", "chain.steps=3", "schedule=last_k", "schedule.k=1", "prompts.batch_size=2")
SHAPES = ("prompts.train=4", "prompts.heldout=2", "val.prompts=2")
FILE = ("prompts=file", "prompts.dev=2", "prompts.heldout=2")
LIGHT = ("reward=[tiny_clip]", "constraint=none", "watch=none")
BAD = {
    "no such prompt file": ((*TRAIN, *FILE, "prompts.path=absent.txt"), ["no prompt file absent.txt"]),
    "no prompt file given": ((*TRAIN, *FILE), ["prompts.path must be given: prompts.path=..."]),
    "empty file": ((*TRAIN, *FILE, "prompts.path=empty.txt"), ["empty.txt holds no prompt"]),
    "not UTF-8": ((*TRAIN, *FILE, "prompts.path=latin.txt"), ["latin.txt is not UTF-8", "iconv"]),
    "too few prompts": ((*TRAIN, *FILE, "prompts.path=few.txt"), ["2 distinct prompts do not give 2 for dev", "lower these"]),
    "a batch that is not filled": ((*TRAIN, *SHAPES, "prompts.batch_size=8"), ["prompts.batch_size=8"]),
    "unknown option": ((*TRAIN, "backbone=sd16"), ["no backbone=sd16", "local, sd15, sd21, tiny", "Did you mean sd"]),
    "unknown reward": ((*TRAIN, "reward=[hpsv3]"), ["no reward=hpsv3", "pickscore", "tiny_clip", "Did you mean hpsv2?"]),
    "unknown reward beside a known one": ((*TRAIN, "reward=[tiny_clip,asthetic]"), ["Did you mean aesthetic?"]),
    "unknown constraint": ((*TRAIN, "constraint=hpsv2"), ["no constraint=hpsv2", "clip_tuned, none, tiny_clip"]),
    "unknown experiment": ((*TRAIN, "experiment=nothing"), ["no experiment=nothing: accepted are"]),
    "unknown key": ((*TRAIN, "chain.stepz=3"), ["no key 'chain.stepz'", "Did you mean chain.steps", "--cfg job"]),
    "unknown top key": ((*TRAIN, "max_step=3"), ["no key 'max_step'", "max_steps"]),
    "no value": ((*TRAIN, "chain"), ["Error parsing override 'chain'"]),
    "K > T": ((*TRAIN, *SHAPES, "schedule.k=4"), ["k=4 gradient steps in a chain of steps=3"]),
    "K = 0": ((*TRAIN, *SHAPES, "schedule.k=0"), ["k=0 gradient steps, accepted: 1 or more"]),
    "negative reward weight": ((*TRAIN, *SHAPES, "reward.tiny_preference.weight=-1"), ["weight of reward tiny_preference is -1.0"]),
    "negative constraint weight": ((*TRAIN, *SHAPES, "constraint.constraint.weight=-1"), ["is -1.0, it must be finite and >= 0"]),
    "weight of a reward not chosen": ((*TRAIN, *SHAPES, "+reward.hpsv2.weight=3"), ["reward.hpsv2 is set but", "reward=[...]"]),
    "no reward": ((*TRAIN, *SHAPES, "reward=[]"), ["no reward: reward=[...] takes one or more names"]),
    "a run folder that exists": (
        (*TRAIN, *SHAPES, "hydra.run.dir=exists"),
        ["holds a run already", "hydra.run.dir", "ckpt_path=last"],
    ),
    "no checkpoint": ((*TRAIN, *SHAPES, "ckpt_path=last"), ["no checkpoint", "last.ckpt", "hydra.run.dir=<run folder>"]),
    "no such checkpoint file": ((*TRAIN, *SHAPES, "ckpt_path=absent.ckpt"), ["no checkpoint absent.ckpt"]),
    "tuned_fraction": ((*TRAIN, *SHAPES, "tuned_fraction=1.5"), ["tuned_fraction=1.5, accepted: 0 (never tuned) to 1"]),
    "negative tuned_fraction": ((*TRAIN, *SHAPES, "tuned_fraction=-0.5"), ["tuned_fraction=-0.5"]),
    "no chain steps": ((*TRAIN, *SHAPES, "chain.steps=0"), ["chain.steps=0: accepted is a whole number, at least 1"]),
    "no steps": ((*TRAIN, *SHAPES, "max_steps=0"), ["max_steps=0: accepted is a whole number, at least 1"]),
    "a word for a number": ((*TRAIN, *SHAPES, "optimizer.lr=fast"), ["optimizer.lr=fast: accepted is a number"]),
    "negative validation": ((*TRAIN, *SHAPES, "val.every=-1"), ["val.every=-1: accepted is a whole number, at least 0"]),
    "unknown tune mode": ((*TRAIN, *SHAPES, "tune.unet=half"), ["tune.unet=half: accepted are full, lora, frozen"]),
    "nothing learns": ((*TRAIN, *SHAPES, "tune.text_encoder=frozen"), ["nothing learns", "both frozen"]),
    "unknown spacing": ((*TRAIN, *SHAPES, "chain.timestep_spacing=even"), ["accepted: leading, trailing, linspace"]),
    "no network": ((*TRAIN, *FILE, "backbone=sd15", "prompts.path=rows.txt"), ["from the hub", "random_weights", "HF_TOKEN"]),
    "a reward without network": ((*TRAIN, *SHAPES, "reward=[hpsv2]"), ["cannot get HPS_v2_compressed.pt", "HF_ENDPOINT"]),
    "no source": ((*TRAIN, "backbone=local", *LIGHT, *FILE, "prompts.path=rows.txt"), ["backbone.source must be given"]),
    "no such source": ((*TRAIN, "backbone.source=./absent", *SHAPES), ["no such folder or file: ./absent", "(in key backbone)"]),
    "neither text nor prompts": (("generate",), ["give either text=", "prompts=file prompts.path=<file>"]),
    "both text and prompts": (("generate", "text=[a]", "prompts=file", "prompts.path=rows.txt"), ["give either text="]),
    "prompts of no file": (("generate", "prompts=shapes"), ["prompts=file prompts.path=<file>"]),
    "generate: no such file": (("generate", "prompts=file", "prompts.path=absent.txt"), ["no prompt file absent.txt"]),
    "generate: no text": (("generate", "text=[]"), ["names no prompt"]),
    "generate: no seed": (("generate", "text=[a]", "seeds=[]"), ["at least one of each"]),
    "generate: negative seed": (("generate", "text=[a]", "seeds=[-1]"), ["seed=-1, accepted"]),
    "generate: no batch": (("generate", "text=[a]", "batch_size=0"), ["batch_size=0: accepted: 1 or more"]),
    "generate: fraction": (("generate", "text=[a]", "tuned_fraction=2"), ["tuned_fraction=2, accepted"]),
    "generate: no steps": (("generate", "text=[a]", "chain.steps=0"), ["steps=0, accepted: 1 to 1000"]),
    "generate: no model": (("generate", "text=[a]", "run=./absent"), ["no such folder or file: ./absent"]),
    "generate: a folder that exists": (("generate", "text=[a]", "hydra.run.dir=exists"), ["holds a run already"]),
    "pretrain: no effort": (("pretrain", "effort=0", "folder=made"), ["effort=0", "above 0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, empty):
    (empty / "empty.txt").write_text("")
    (empty / "few.txt").write_text("one\ntwo\n")
    (empty / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (empty / "rows.txt").write_text(ROWS)
    (empty / "exists").mkdir()
    (empty / "exists" / "run.json").write_text("{}")
    arguments, words = BAD[case]
    refused(door(*arguments), *words)
    assert (empty / "exists" / "run.json").read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_clear_error(empty):
    refused(door(*TRAIN, *SHAPES, "trainer=gpu"), "gpu", "(in key trainer)")


def test_our_own_mistakes_keep_their_traceback(empty, monkeypatch):
    from tc_lightning.cli import build

    monkeypatch.setattr(build, "check_numbers", lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        door(*TRAIN, *SHAPES)


def test_the_whole_traceback_is_one_variable_away(empty, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="max_steps=0"):
        door(*TRAIN, *SHAPES, "max_steps=0")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


@pytest.mark.parametrize("words", [("trian",), ("trian", "max_steps=1")])
def test_unknown_verb(words):
    done = door(*words)
    assert done.status == 1 and "unknown verb 'trian': accepted are train, " in done.err and "Did you mean train?" in done.err


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_verb(words):
    from tc_lightning.cli import VERBS

    done = door(*words)
    assert done.status == 0 and all(re.search(rf"^  {verb} +\S", done.out, re.MULTILINE) for verb in VERBS)
    assert done.out.count("\n  python -m tc_lightning") >= 3


def test_help_of_a_verb_is_a_sentence_examples_and_groups():
    from tc_lightning.cli import VERBS, conf_folder

    for verb in VERBS:
        done = door(verb, "--help")
        lines = done.out.strip().splitlines()
        assert done.status == 0 and lines[0].endswith(".") and lines[0].count(".") == 1, verb
        assert sum(line.startswith(f"python -m tc_lightning {verb}") for line in lines) >= 3, verb
    shown = door("train", "--help").out
    for group in ("backbone", "reward", "constraint", "schedule", "prompts", "trainer", "logger"):
        for option in (conf_folder() / group).glob("*.yaml"):
            assert re.search(rf"^{group}: .*\b{option.stem}\b", shown, re.MULTILINE), option


def test_every_verb_says_what_comes_next_and_where(finished_output):
    assert re.search(r"^run folder  \S+$", finished_output, re.MULTILINE)
    assert re.search(r"^next        python -m tc_lightning generate run=", finished_output, re.MULTILINE)
    for word in ("learns", "486,144 parameters", "UNet calls", "held-out prompts, same seeds", "after - before, 95 %"):
        assert word in finished_output


@pytest.fixture(scope="module")
def finished_output(tmp_path_factory):
    from small_runs import SMALL

    done = door("train", *SMALL, f"hydra.run.dir={tmp_path_factory.mktemp('shown') / 'run'}")
    assert done.status == 0, done.err
    return done.out


@pytest.mark.full
def test_a_run_is_resumed_with_the_settings_it_had(finished, tmp_path):
    """Anything else would train something else without a word; and a refusal leaves the run's records as they were."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    records = [run / "run.json", *sorted((run / ".hydra").iterdir())]
    before = [file.read_bytes() for file in records]
    again = (*SMALL, f"hydra.run.dir={run}", "ckpt_path=last", "max_steps=3")
    for change, words in (
        (("reward=[tiny_aesthetic]",), ("reward.tiny_", "settings changed", "backbone.text_encoder=<run folder>")),
        (("constraint=none",), ("constraint.constraint", "settings changed")),
        (("chain.steps=4",), ("chain.steps was 3 and is 4",)),
        (("tune.text_encoder=lora",), ("tune.text_encoder was full and is lora",)),
        (("optimizer.weight_decay=-1",), ("weight_decay", "at least 0")),
        (("ckpt_path=best.ckpt",), ("no checkpoint",)),
    ):
        done = door("train", *again, *change)
        refused(done, *words)
        assert done.status == 2, done.err
    refused(door("train", *SMALL, f"hydra.run.dir={run}"), "holds a run already")
    assert [file.read_bytes() for file in records] == before


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("chain.steps=2.5", "chain.steps=2.5: accepted is a whole number, at least 1"),
        ("max_steps=1.5", "max_steps=1.5: accepted is a whole number"),
        ("val.every=1.5", "val.every=1.5"),
        ("prompts.heldout=-1", "prompts.heldout=-1"),
        ("prompts.batch_size=a", "prompts.batch_size=a: accepted is a whole number"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("tune.rank=0", "tune.rank=0"),
        ("seed=1.5", "seed=1.5: accepted is a whole number"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
    ],
)
def test_numbers_are_looked_at_before_anything_is_loaded(setting, words, empty):
    done = door("train", setting)
    refused(done, words)
    assert done.status == 2 and list(empty.rglob("run.json")) == []


def test_a_hint_knows_the_chosen_group(empty):
    done = door("train", "prompts=file", "prompts.path=x.txt", "prompts.train=16")
    refused(done, "no key 'prompts.train'")
    assert "Did you mean prompts.train" not in done.err
