"""Evaluation: scores that depend on nothing but model, prompt and seed; continued, shared, refused."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tc_lightning.backbone import Backbone, BackboneError
from tc_lightning.benches import Bench
from tc_lightning.evaluate import Evaluation, image_seed, write_report
from tc_lightning.measures import diversity, saturation, text_drift
from tc_lightning.report import Scores
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.oracle import Oracle
from tc_lightning.rewards.tiny import tiny_clip
from tc_lightning.sampling import Sampler
from tc_lightning.scoring import filled

BENCH = Bench.shapes(count=256, limit=5)


@pytest.fixture(scope="module")
def backbone():
    return Backbone.load("tiny")


@pytest.fixture(scope="module")
def moved(backbone):
    """The same model with another text encoder, as after training."""
    original = backbone.frozen_text_encoder()
    tuned = Backbone.load("tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.text_encoder.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return Sampler(tuned, 2, 4.0, original=original, tuned_fraction=0.6)


@pytest.fixture(scope="module")
def rewards():
    return RewardMix(clip=tiny_clip(), oracle=Oracle(strict=False))


@pytest.fixture
def make(backbone, moved, rewards, tmp_path):
    """make(folder, **changes) -> Evaluation of two models."""

    def build(folder="a", bench=BENCH, **changes):
        models = {"base": lambda: Sampler(backbone, 2, 4.0), "tuned": lambda: moved}
        options = {"seeds": 2, "batch_size": 8, "shown": 3, "micro_batch": 4} | changes
        return Evaluation(bench, models, options.pop("rewards", rewards), tmp_path / folder, **options)

    return build


@pytest.fixture(scope="module")
def reference(backbone, moved, rewards, tmp_path_factory):
    models = {"base": lambda: Sampler(backbone, 2, 4.0), "tuned": lambda: moved}
    evaluation = Evaluation(BENCH, models, rewards, tmp_path_factory.mktemp("reference"), 2, 4, 3, micro_batch=4)
    assert evaluation.run()
    return evaluation.scores()


def same(one: Scores, two: Scores) -> None:
    keys = ("model", "prompt", "category", "seed")
    assert [[row[key] for key in keys] for row in one.rows] == [[row[key] for key in keys] for row in two.rows]
    assert one.rewards == two.rewards
    for model in one.models:
        for name in one.rewards:
            np.testing.assert_allclose(one.column(model, name), two.column(model, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_changes_no_score(batch_size, make, reference):
    evaluation = make(batch_size=batch_size)
    assert evaluation.run()
    same(evaluation.scores(), reference)


def test_the_number_of_threads_changes_no_score(make, reference):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert make().run()
        assert torch.get_num_threads() == 2  # as it was found
    finally:
        torch.set_num_threads(threads)
    same(make().scores(), reference)


def test_a_short_batch_is_filled_up():
    batches = list(filled(["a", "b", "c"], [1, 2, 3], 2))
    assert batches == [(["a", "b"], [1, 2], 2), (["c", "c"], [3, 3], 1)]


def test_the_order_of_prompts_changes_no_score(make, reference):
    evaluation = make(bench=Bench(BENCH.name, BENCH.prompts[::-1], BENCH.categories[::-1]))
    evaluation.run()
    rows = sorted(evaluation.scores().rows, key=lambda row: (row["model"], BENCH.prompts.index(row["prompt"])))
    same(Scores(rows), reference)


def test_processes_that_share_the_work_change_no_score(make, reference):
    assert not make().run(rank=1, world=2)
    assert make().run(rank=0, world=2)
    same(make().scores(), reference)


def test_an_interrupted_evaluation_continues(make, reference, tmp_path):
    def stop(model, done, of, left):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(batch_size=2).run(say=stop)
    half = make().finished("base")
    assert len(half) == 2
    file = tmp_path / "a" / "progress" / "base" / "0.jsonl"
    with file.open("a") as opened:
        opened.write('{"row": 3, "images": [{"se')  # killed while it wrote
    told = []
    assert make(batch_size=2).run(say=lambda *now: told.append(now))
    assert told[0][2] == 6  # images of the base that were missing
    same(make().scores(), reference)


def test_a_finished_evaluation_loads_no_model(make):
    make().run()
    again = make()
    again.models = dict.fromkeys(again.models, pytest.fail)
    assert again.run()


def test_what_is_written(make, tmp_path):
    evaluation = make()
    evaluation.run()
    scores = write_report(evaluation, {"tuned": ["clip"]})
    folder = tmp_path / "a"
    assert Scores.load(folder / "scores.csv").rows == scores.rows
    assert set(scores.rewards) == {"clip", "oracle", "saturation", "diversity", "text_drift"}
    found = json.loads((folder / "scores.json").read_text())
    assert found["prompts"] == 5
    assert found["images"] == 10
    assert set(found["against_base"]["tuned"]["clip"]) == {"mean", "low", "high", "wins", "ties"}
    assert "wins" not in found["against_base"]["tuned"]["text_drift"]
    assert "Trained on clip" in found["verdicts"][0]
    text = (folder / "scores.md").read_text()
    assert "## tuned against base, same prompts and seeds" in text
    assert "## clip by category" in text
    assert sorted(path.stem for path in (folder / "plots").iterdir()) == sorted(scores.rewards)
    assert [path.name for path in (folder / "grids").iterdir()] == ["000.png"]
    assert len(list((folder / "images" / "base").iterdir())) == 6


def test_measures_of_hacking(make, reference):
    assert (reference.column("base", "text_drift") == 0).all()
    assert (reference.column("tuned", "text_drift") > 0).all()
    assert ((reference.column("base", "diversity") > 0) & (reference.column("base", "diversity") < 2)).all()


def test_diversity_is_the_mean_pairwise_distance():
    embeds = torch.nn.functional.normalize(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = [1 - embeds[i] @ embeds[j] for i in range(5) for j in range(i)]
    torch.testing.assert_close(diversity(embeds).mean(), torch.stack(pairs).mean())
    torch.testing.assert_close(diversity(embeds[:1].expand(3, 7)), torch.zeros(3), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="accepted: 2 or more seeds"):
        diversity(embeds[:1])


def test_saturation_and_drift():
    images = torch.full((2, 3, 2, 2), 0.5)
    images[1, 0, 0, 0], images[1, 1, 1, 1] = 0.0, 1.0
    torch.testing.assert_close(saturation(images), torch.tensor([0.0, 2 / 12]))
    embeds = torch.ones(2, 3, 4)
    torch.testing.assert_close(text_drift(torch.stack([embeds[0], 3 * embeds[1]]), embeds), torch.tensor([0.0, 2.0]))


def test_seeds_differ_between_prompts_images_and_repetitions():
    seeds = {image_seed(prompt, again, number) for prompt in ("a", "b") for again in range(2) for number in range(3)}
    assert len(seeds) == 12
    assert image_seed("a", 0, 0) == image_seed("a", 0, 0)


def test_another_evaluation_is_not_overwritten(make, tmp_path):
    make()
    before = (tmp_path / "a" / "evaluation.json").read_text()
    with pytest.raises(FileExistsError, match="seeds: 2, now 3"):
        make(seeds=3)
    with pytest.raises(FileExistsError, match="prompts"):
        make(bench=Bench.shapes(limit=4))
    assert (tmp_path / "a" / "evaluation.json").read_text() == before
    with pytest.raises(FileExistsError, match="micro_batch: 4, now 8"):
        make(micro_batch=8)
    make(batch_size=1)  # of no consequence


def test_a_reward_that_gives_nan_is_named_with_its_prompt(make):
    def broken(images, prompts):
        return torch.tensor([float("nan") if prompt == BENCH.prompts[3] else 0.0 for prompt in prompts])

    evaluation = make(rewards=RewardMix(broken=broken), batch_size=2)
    with pytest.raises(FloatingPointError, match="reward broken gave nan") as error:
        evaluation.run()
    assert BENCH.prompts[3] in str(error.value)
    assert len(evaluation.finished("base")) == 3  # what was scored before it stays


def test_bad_numbers(make):
    with pytest.raises(ValueError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="seeds=0"):
        make(seeds=0)
    with pytest.raises(ValueError, match="micro_batch=0"):
        make(micro_batch=0)


def run_folder(folder, backbone, part=True, base="tiny"):
    """A run folder as train leaves it."""
    folder.mkdir(parents=True)
    config = {
        "chain": {"steps": 2, "guidance_scale": 4.0, "timestep_spacing": "trailing"},
        "reward": {"tiny_preference": {"weight": 1.0}},
        "constraint": {"constraint": {"_target_": "tc_lightning.rewards.tiny.tiny_clip"}},
    }
    record = {"verb": "train", "status": "finished", "backbone": {"source": base}, "tuned_fraction": 0.6, "config": config}
    (folder / "run.json").write_text(json.dumps(record))
    if part:
        from tc_lightning.backbone import save_model

        save_model(backbone.text_encoder, folder / "text_encoder")
    return folder


@pytest.fixture
def verb(monkeypatch, tmp_path, capsys):
    """verb("key=value", ...) -> (exit status, what was printed); in this process, in an empty folder."""
    from hydra.core.global_hydra import GlobalHydra

    from tc_lightning.cli import main

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tc-lightning", "evaluate", *arguments])
        GlobalHydra.instance().clear()
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


SMALL = ("bench.limit=4", "seeds=2", "chain.steps=2", "shown=2", "processes=1", "micro_batch=4", "reward=[tiny_clip]")


@pytest.mark.full
def test_the_verb_compares_a_run_with_its_base(verb, moved, tmp_path):
    run = run_folder(tmp_path / "runs" / "one", moved.backbone)
    status, said = verb(f"run=[base,{run}]", *SMALL, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 0, said
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(found["models"]) == ["base", "one"]
    assert found["trained_on"] == {"one": ["tiny_preference", "tiny_clip"]}
    assert found["models"]["one"]["text_drift"]["mean"] > 0
    assert set(found["models"]["one"]) >= {"tiny_clip", "oracle", "oracle_partial"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
    assert "next" in said
    whole = (tmp_path / "out" / "scores.csv").read_bytes()

    status, said = verb(f"run=[base,{run}]", *SMALL, f"hydra.run.dir={tmp_path / 'out'}")  # all of it is done
    assert status == 0
    assert (tmp_path / "out" / "scores.csv").read_bytes() == whole

    status, said = verb(f"run=[base,{run}]", *SMALL, "chain.scheduler=euler", f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 1
    assert "holds another evaluation" in said
    assert (tmp_path / "out" / "scores.csv").read_bytes() == whole


@pytest.mark.full
def test_a_kill_and_two_processes_change_no_score(verb, root, tmp_path):
    settings = ["bench.limit=6", "seeds=2", "shown=2", "chain.steps=8", "reward=[tiny_clip]", "watch=none", "micro_batch=2"]
    command = [sys.executable, "-m", "tc_lightning", "evaluate", *settings, "hydra.run.dir=killed"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    killed = subprocess.Popen([*command, "batch_size=1", "processes=1"], **options)
    progress = tmp_path / "killed" / "progress" / "tiny" / "0.jsonl"
    until = time.monotonic() + 200
    while not (progress.is_file() and progress.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 0 < progress.read_text().count("\n") < 6

    done = subprocess.run([*command, "batch_size=8", "processes=2"], **options)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "killed" / "progress" / "tiny" / "1.jsonl").is_file()
    status, said = verb(*settings, "batch_size=3", "processes=1", "hydra.run.dir=whole")
    assert status == 0, said
    same(*(Scores.load(tmp_path / folder / "scores.csv") for folder in ("killed", "whole")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=base"], "name a run folder too"),
        (["run=[]"], "names no model"),
        (["names=[a,b]"], "2 names for 1 models"),
        (["reward=[]", "watch=none"], "nothing to score with"),
        (["bench.category=triangles"], "has no category 'triangles': it has two things, one thing"),
        (["bench.count=0"], "bench shapes is empty"),
        (["bench=file"], "path"),
        (["chain.scheduler=ddpm"], "accepted: ddim, pndm"),
        (["seeds=0"], "seeds=0"),
    ],
)
def test_bad_settings(arguments, message, verb, tmp_path):
    status, said = verb(*SMALL[1:], *arguments, f"hydra.run.dir={tmp_path / 'out'}")
    assert status in (1, 2), said
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "scores.csv").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "holds no prompt"),
        (b"a caf\xe9\n", [], "is not UTF-8"),
        (b"text\na cat\n", ["csv"], "has no column 'prompt': it has text"),
        (b"prompt,kind\na cat,animal\n", ["csv", "bench.category_column=kind", "bench.category=plant"], "has no category 'plant'"),
    ],
)
def test_a_bad_file_leaves_what_was_there(content, arguments, message, verb, tmp_path):
    file = tmp_path / f"prompts.{arguments.pop(0) if arguments else 'txt'}"
    file.write_bytes(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.csv").write_text("mine")
    status, said = verb("bench=file", f"bench.path={file}", *arguments, f"hydra.run.dir={tmp_path / 'out'}")
    assert status in (1, 2) and message in said and "Traceback" not in said, said
    assert (tmp_path / "out" / "scores.csv").read_text() == "mine"
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.full
def test_ctrl_c_says_how_to_go_on(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluation, "run", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    status, said = verb(*SMALL, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 130 and "what is scored is kept" in said
    command = shlex.split(said.rsplit("continue", 1)[1])
    assert command == ["python", "-m", "tc_lightning", "evaluate", *SMALL, f"hydra.run.dir={tmp_path / 'out'}"]


@pytest.mark.full
def test_nan_is_one_message(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(Oracle, "score", lambda self, images, prompts: torch.full((len(images),), float("nan")))
    status, said = verb(*SMALL, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 1 and "reward oracle gave nan" in said and "Traceback" not in said, said
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_a_run_folder_without_what_it_tuned(verb, backbone, tmp_path):
    run = run_folder(tmp_path / "empty", backbone, part=False)
    status, said = verb(f"run=[base,{run}]", *SMALL, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 1
    assert "did not finish or tuned nothing" in said


def test_a_run_folder_of_another_model(verb, backbone, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    from tc_lightning.backbone import save_model

    run = run_folder(tmp_path / "other", backbone, part=False)
    other = CLIPTextModel(
        CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    save_model(other, run / "text_encoder")
    with pytest.raises(BackboneError, match="does not fit as text_encoder"):
        Backbone.load(run)
    status, said = verb(f"run=[tiny,{run}]", *SMALL, f"hydra.run.dir={tmp_path / 'out'}")
    assert status == 1
    assert "does not fit as text_encoder" in said
    assert not (tmp_path / "out" / "progress").exists()  # told before the first model's images
