"""The mixing page's work without the page: pictures, scores, strips, history, saved mixtures, and what it refuses."""

import json
import shlex
import sys

import pytest
import torch
from tuned_runs import CHAIN, make_run

import tc_lightning as tc
from tc_lightning import markup
from tc_lightning.backbone import Backbone
from tc_lightning.cli import main
from tc_lightning.pixels import load_png
from tc_lightning.playground import MAX_PROMPT, Picture, Playground, Trial
from tc_lightning.rewards.mix import RewardMix

PROMPT = "a red circle on the left"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, seed) for seed, name in enumerate(("bold", "calm"))]


@pytest.fixture(scope="module")
def tiny():
    return Backbone.load("tiny")


@pytest.fixture
def playground(runs, tiny, tmp_path):
    tuned = {run.name: Backbone.load(run).text_encoder for run in runs}
    rewards = RewardMix(brightness=lambda images, prompts: images.mean((1, 2, 3)))
    return Playground(tiny, tuned, tmp_path / "page", rewards, {**CHAIN, "steps": 2}, [str(run) for run in runs])


def trial(**changes):
    return Trial(**{"prompt": PROMPT, "weights": (0.3, 0.2), "seed": 3, "steps": 2, "guidance_scale": 4.0, **changes})


def test_pictures_are_the_mixtures(playground, tiny):
    original, mixture, bold, calm = playground.compare(trial(), alone=True)
    options = {"prompts": [PROMPT], "seeds": [3], "steps": 2, "guidance_scale": 4.0}
    assert torch.equal(original.image, tc.generate(tiny, **options)[0])
    assert torch.equal(mixture.image, tc.mix(tiny, playground.tuned, weights=[0.5, 0.3, 0.2], **options)[0])
    assert torch.equal(bold.image, tc.mix(tiny, playground.tuned, weights=[0, 1, 0], **options)[0])
    assert [p.label for p in (original, mixture, bold, calm)] == ["original", "mixture", "bold", "calm"]
    assert mixture.scores == pytest.approx({"brightness": float(mixture.image.mean())}, abs=1e-6)


def test_progress_runs_from_the_first_step_to_the_last(playground):
    told = []
    playground.compare(trial(), say=lambda done, what: told.append((done, what)))
    assert told == [
        (0.0, "original, step 1 of 2"),
        (0.25, "original, step 2 of 2"),
        (0.5, "mixture, step 1 of 2"),
        (0.75, "mixture, step 2 of 2"),
    ]


def test_a_strip_is_what_its_slider_does(playground):
    strip = playground.strip(trial(), "calm")
    assert [p.label for p in strip] == ["0 calm", "0.25 calm", "0.5 calm", "0.75 calm", "1 calm"]
    moved = playground.compare(trial(weights=(0.3, 0.75)))[1]
    assert torch.equal(strip[3].image, moved.image)
    with pytest.raises(ValueError, match="accepted are bold, calm"):
        playground.strip(trial(), "loud")


def test_history_is_kept_and_written(playground):
    for weights in ((0.3, 0.2), (0.3, 0.2), (0.5, 0.2)):
        made = playground.compare(trial(weights=weights))
    lines = [json.loads(line) for line in (playground.folder / "history.jsonl").read_text().splitlines()]
    assert len(lines) == len(playground.history) == 2, "the same twice is one"
    assert lines[1]["settings"]["weights"] == {"original": 0.3, "bold": 0.5, "calm": 0.2}
    saved = load_png(playground.folder / "pictures" / "0001_1.png")
    assert torch.equal(saved, (made[1].image * 255).round() / 255)


def test_a_saved_mixture_is_a_run_under_the_folder(playground, tiny):
    place = playground.save(trial(tuned_fraction=0.6), "../my mix!")
    assert place == playground.folder / "encoders" / "my-mix"
    loaded = Backbone.load(place)
    wanted = playground.compare(trial(space="weights"))[1].image
    assert torch.equal(tc.generate(loaded, [PROMPT], [3], steps=2, guidance_scale=4.0)[0], wanted)
    card = json.loads((place / "run.json").read_text())
    assert card["tuned_fraction"] == 0.6 and card["mixtures"] == [{"original": 0.5, "bold": 0.3, "calm": 0.2}]
    with pytest.raises(ValueError, match="my-mix exists already"):
        playground.save(trial(), "my mix")
    for name in ("", "../..", "///"):
        with pytest.raises(ValueError, match="name of letters"):
            playground.save(trial(), name)
    assert {path.name for path in playground.folder.parent.iterdir()} == {"page"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "a" * (MAX_PROMPT + 1)}, "2001 characters, accepted: up to 2000"),
        ({"seed": -1}, "seed is -1, accepted: 0 to"),
        ({"seed": None}, "seed is None"),
        ({"steps": 0}, "steps is 0, accepted: 1 to 150"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"tuned_fraction": 1.5}, "tuned_fraction is 1.5, accepted: 0 to 1"),
        ({"scheduler": "magic"}, "scheduler is 'magic', accepted: ddim"),
        ({"space": "latent"}, "space is 'latent', accepted: embedding, weights"),
        ({"weights": (0.5,)}, "1 weights for 2 text encoders"),
        ({"weights": (0.5, "much")}, "calm is much, accepted: -2 to 3"),
        ({"weights": (0.5, float("inf"))}, "calm is inf"),
    ],
)
def test_refused_with_a_word(changes, message, playground):
    with pytest.raises(ValueError, match=message):
        playground.compare(trial(**changes))
    assert playground.history == [] and not playground.folder.exists(), "nothing was sampled or written"


def test_the_first_trial_stands_where_sliders_can(playground):
    first = playground.first_trial("a")
    assert first.weights == (0.35, 0.35) and first.all_weights == (0.3, 0.35, 0.35) and first.steps == 2
    assert playground.check(first) == first


def test_notes(playground):
    assert playground.note(trial()) == ""
    assert "reads the first 32" in playground.note(trial(prompt="a red circle " * 20))
    assert "the original is subtracted (-0.4)" in playground.note(trial(weights=(0.7, 0.7)))


@pytest.mark.full
@pytest.mark.parametrize("prompt", [PROMPT, 'a "red" circle, {left}: it\'s ünder [that] $HOME'])
def test_the_command_makes_the_same_picture(prompt, playground, monkeypatch, tmp_path):
    tried = playground.check(trial(prompt=prompt, tuned_fraction=0.6, scheduler="euler"))
    made = playground.compare(tried)[1].image
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tc_lightning", *shlex.split(playground.command(tried))[3:], "hydra.run.dir=again"])
    main()
    assert torch.equal(load_png(tmp_path / "again" / "00" / "0000_3.png"), (made * 255).round() / 255)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run=/nowhere/at/all"], "no such folder or file: /nowhere/at/all"),
        (["run=tiny:loud"], "no tiny:loud ships"),
        (["run=[tiny:clip]", "names=[a,b]"], "2 names for 1 text encoders"),
        (["images=/nowhere"], "/nowhere holds no finished evaluation"),
    ],
)
def test_mistakes_of_the_verb_are_one_message(settings, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tc_lightning", "app", *settings])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


class TestMarkup:
    PICTURES = (Picture("original", torch.zeros(3, 4, 4), {"clip": 0.5}), Picture("<b>", torch.ones(3, 4, 4), {"clip": 0.25}))

    def test_what_a_user_wrote_is_escaped(self):
        made = markup.figures(self.PICTURES, '"><script>alert(1)</script>') + markup.message("<img src=x>", "error")
        assert "<script" not in made and "<b>" not in made and "<img src=x>" not in made

    def test_scores_and_their_difference(self):
        made = markup.figures(self.PICTURES, "a")
        assert "<dd>0.50</dd>" in made and '<dd>0.25 <span class="down">-0.25</span></dd>' in made

    def test_nothing_is_fetched(self):
        made = markup.figures(self.PICTURES, "a", {"prompt": "a"})
        assert "http" not in made and made.count("data:image/png;base64,") == 4
        assert "http" not in markup.STYLE and "@import" not in markup.STYLE

    def test_an_error_is_spoken(self):
        assert 'role="alert"' in markup.message("no", "error") and markup.message("") == ""
