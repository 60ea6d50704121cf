"""Mixtures of text encoders: their ends are the encoders themselves bit for bit, in both spaces, through the verb too."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel
from tuned_runs import CHAIN, make_run

import tc_lightning as tc
from tc_lightning.backbone import Backbone
from tc_lightning.cli import main
from tc_lightning.cli.mix import load_tuned
from tc_lightning.mixing import Mixture, interpolation, merge, mix, mixed_text_encoder, strip, styles
from tc_lightning.pixels import load_png

PROMPT = ["a red circle on the left"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, seed, tuned_fraction=0.6) for seed, name in enumerate(("bold", "calm", "odd"))]


@pytest.fixture(scope="module")
def tiny():
    return Backbone.load("tiny")


@pytest.fixture(scope="module")
def tuned(runs):
    return {run.name: Backbone.load(run).text_encoder for run in runs}


def images(backbone, **options):
    return tc.generate(backbone, PROMPT, [3], **CHAIN, **options)


class TestWeights:
    def test_presets_are_the_papers(self):
        assert interpolation() == [[1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1]]
        assert styles(3) == [[1, 0, 0, 0], [0.1, 0.3, 0.3, 0.3], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]]

    @pytest.mark.parametrize("count", [2, 3, 4, 7])
    def test_styles_of_any_number_sum_to_one(self, count):
        names = [f"m{i}" for i in range(count)]
        assert [len(Mixture.of(weights, names).weights) for weights in styles(count)] == [count + 1] * (count + 2)

    @pytest.mark.parametrize("weights", [[0.5], [0.5, 0.25, 0.25], []])
    def test_wrong_number(self, weights):
        with pytest.raises(ValueError, match="weights .* for 2 text encoders: one each for original, bold"):
            Mixture.of(weights, ["bold"])

    def test_wrong_sum(self):
        with pytest.raises(ValueError, match="sum to 0.9, accepted: 1 within 1e-6; normalize=true"):
            Mixture.of([0.4, 0.5], ["bold"])
        assert Mixture.of([1, 3], ["bold"], normalize=True).weights == (0.25, 0.75)
        with pytest.raises(ValueError, match="cannot be rescaled"):
            Mixture.of([1, -1], ["bold"], normalize=True)

    def test_not_a_number(self):
        with pytest.raises(ValueError, match="finite"):
            Mixture.of([float("nan"), 1], ["bold"])

    def test_label(self):
        assert Mixture.of([0.25, 0.75], ["bold"]).label == "0.25 original, 0.75 bold"

    def test_presets_want_their_number(self):
        with pytest.raises(ValueError, match="preset=figure_5"):
            interpolation(2)
        with pytest.raises(ValueError, match="preset=figure_4"):
            styles(1)


@pytest.mark.parametrize("space", ["embedding", "weights"])
@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_ends_are_the_encoders_bit_for_bit(space, fraction, tiny, tuned):
    bold = {"bold": tuned["bold"]}
    options = {"seeds": [3], "space": space, "tuned_fraction": fraction, **CHAIN}
    none, half, full = (mix(tiny, bold, PROMPT, [1 - w, w], **options) for w in (0.0, 0.5, 1.0))
    whole = Backbone.load("tiny")
    original, whole.text_encoder = whole.text_encoder, bold["bold"]
    assert torch.equal(none, images(tiny))
    assert torch.equal(full, images(whole, tuned_fraction=fraction, original=original))
    assert not torch.equal(half, none) and not torch.equal(half, full)


def test_embedding_space_is_the_weighted_sum(tiny, tuned):
    weights = [0.1, 0.7, 0.1, 0.1]
    embeds = [tiny.encode(PROMPT, encoder) for encoder in (tiny.text_encoder, *tuned.values())]
    wanted = sum(weight * embed for weight, embed in zip(weights, embeds, strict=True))
    torch.testing.assert_close(tiny.encode(PROMPT, mixed_text_encoder(tiny.text_encoder, tuned, weights)), wanted)


def test_weight_space_is_the_weighted_sum_of_parameters(tiny, tuned):
    before = {key: value.clone() for key, value in tiny.text_encoder.state_dict().items()}
    merged = merge([tiny.text_encoder, tuned["bold"]], [0.25, 0.75]).state_dict()
    for key, value in merged.items():
        torch.testing.assert_close(value, 0.25 * before[key] + 0.75 * tuned["bold"].state_dict()[key])
        assert torch.equal(before[key], tiny.text_encoder.state_dict()[key]), "the original is left alone"


def test_outside_the_window_the_mixture_is_not_seen(tiny, tuned):
    assert torch.equal(mix(tiny, tuned, PROMPT, [0.1, 0.3, 0.3, 0.3], seeds=[3], tuned_fraction=0.0, **CHAIN), images(tiny))


def test_different_widths_do_not_mix(tiny, tuned):
    wide = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, vocab_size=659))
    with pytest.raises(ValueError, match="wide and original do not mix: .* is .* in wide and"):
        mixed_text_encoder(tiny.text_encoder, {**tuned, "wide": wide}, [0.25] * 5)


def test_unknown_space(tiny, tuned):
    with pytest.raises(ValueError, match="space='latent', accepted: embedding, weights"):
        mixed_text_encoder(tiny.text_encoder, tuned, [1, 0, 0, 0], space="latent")


def test_adapters_of_a_run_are_merged_and_a_tuned_unet_is_refused(tmp_path, tiny, runs):
    adapted, both = make_run(tmp_path / "adapted", 7, lora=True), make_run(tmp_path / "both", 8, unet=True)
    base, tuned, _ = load_tuned([str(adapted), str(runs[0])], ["adapted", "bold"], None, "cpu")
    mixed = merge([base.text_encoder, *tuned.values()], [0.0, 1.0, 0.0])
    torch.testing.assert_close(tiny.encode(PROMPT, mixed), Backbone.load(adapted).encode(PROMPT))
    assert torch.equal(base.encode(PROMPT), tiny.encode(PROMPT)), "the base is the original"
    with pytest.raises(ValueError, match="tuned its UNet too"):
        load_tuned([str(both)], ["both"], None, "cpu")
    _, tuned, _ = load_tuned([str(both / "text_encoder")], ["both"], "tiny", "cpu")
    assert torch.equal(tiny.encode(PROMPT, tuned["both"]), Backbone.load(both).encode(PROMPT))


def test_strip_has_a_column_a_mixture():
    mixtures = [Mixture.of(weights, ["bold"]) for weights in interpolation()]
    picture = strip(torch.zeros(5, 2, 3, 32, 32), mixtures, ["one", "two"])
    assert isinstance(picture, Image.Image) and picture.width > 5 * 160 and picture.height > 2 * 160


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """The command line's `mix` in this process, in an empty folder."""

    def run(*settings: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tc_lightning", "mix", f"hydra.run.dir={tmp_path / 'out'}", *settings])
        main()

    return run


@pytest.mark.full
class TestVerb:
    def test_interpolation_and_its_ends(self, runs, verb, tmp_path, tiny):
        verb(f"run={runs[0]}", 'text=["a red circle on the left"]', "seeds=[3]")
        made = [load_png(tmp_path / "out" / f"{number:02d}" / "0000_3.png") for number in range(5)]
        assert torch.equal(made[0], (images(tiny)[0] * 255).round() / 255)
        assert all(not torch.equal(one, two) for one, two in zip(made, made[1:], strict=False))
        assert (tmp_path / "out" / "strip.png").is_file()
        card = json.loads((tmp_path / "out" / "run.json").read_text())
        assert card["tuned_fraction"] == 0.6 and card["mixtures"][1] == {"original": 0.75, "bold": 0.25}

    def test_a_saved_mixture_is_a_run(self, runs, verb, tmp_path, tuned, tiny):
        chosen = "run=[" + ",".join(map(str, runs[:2])) + "]"
        verb(
            chosen,
            'text=["a"]',
            "weights=[1,2,1]",
            "normalize=true",
            "space=weights",
            "chain.steps=2",
            f"save={tmp_path / 'mixed'}",
        )
        two = {name: tuned[name] for name in ("bold", "calm")}
        wanted = mixed_text_encoder(tiny.text_encoder, two, [0.25, 0.5, 0.25], "weights")
        loaded = Backbone.load(tmp_path / "mixed")
        torch.testing.assert_close(loaded.encode(PROMPT), tiny.encode(PROMPT, wanted))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["weights=[0.5,0.25,0.25]"], "3 weights .* for 2 text encoders"),
            (["weights=[0.5,0.4]"], "sum to 0.9"),
            (["weights=[0.5,half]"], "accepted is a list of numbers"),
            (["run=/nowhere/at/all"], "no such folder or file: /nowhere/at/all"),
            (["weights=[0.5,0.5]", "save=mixed"], "space=weights"),
            (["preset=figure_5"], "preset=figure_4"),
        ],
    )
    def test_mistakes_are_one_message(self, settings, message, runs, verb, capsys):
        with pytest.raises(SystemExit):
            verb(f"run={runs[0]}", 'text=["a"]', *settings)
        assert re.search(message, capsys.readouterr().err)
