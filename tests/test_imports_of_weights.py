"""Text encoders from wherever people have them: every layout gives the same embeddings, a key that does not fit is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_lightning import single_file
from tc_lightning.backbone import TINY, TUNED, Backbone, BackboneError, save_model, shipped
from tc_lightning.weights import WeightsError, read_text_encoder

PROMPTS = ["", "a red circle on the left", "two blue squares"]


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return Backbone.load("tiny")


@pytest.fixture(scope="module")
def tuned(tiny) -> Backbone:
    """The embedded model with another text encoder."""
    changed = Backbone.load("tiny")
    torch.manual_seed(1)
    for parameter in changed.text_encoder.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return changed


def old_names(backbone: Backbone, prefix: str = "text_model.") -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in single_file.plain_text_state(backbone.text_encoder.state_dict()).items()}


def published(tuned, folder):
    """As TextCraftor's authors saved theirs: transformers 4 with its position numbers, under DDP, by torch.save."""
    state = old_names(tuned, "module.text_model.")
    torch.save(state | {"module.text_model.embeddings.position_ids": torch.arange(32)[None]}, folder / "tc_text_e_0.pth")
    return folder / "tc_text_e_0.pth"


def model_folder(tuned, folder):
    save_model(tuned.text_encoder, folder / "text_encoder")
    return folder / "text_encoder"


def run_folder(tuned, folder):
    save_model(tuned.text_encoder, folder / "run" / "text_encoder")
    (folder / "run" / "run.json").write_text(json.dumps({"backbone": {"source": "tiny"}}))
    return folder / "run"


def clip_l(tuned, folder):
    save_file({key: value.contiguous() for key, value in old_names(tuned).items()}, folder / "clip_l.safetensors")
    return folder / "clip_l.safetensors"


def first_of_sdxl(tuned, folder):
    state = old_names(tuned, "conditioner.embedders.0.transformer.text_model.")
    save_file(state | {"conditioner.embedders.1.model.token_embedding.weight": torch.zeros(2, 2)}, folder / "xl.safetensors")
    return folder / "xl.safetensors"


def original_1(tuned, folder):
    save_file(single_file.text_to_original(tuned.text_encoder.state_dict()), folder / "sd1.safetensors")
    return folder / "sd1.safetensors"


def original_2(tuned, folder):
    save_file(single_file.text_to_original(tuned.text_encoder.state_dict(), open_clip=True), folder / "sd2.safetensors")
    return folder / "sd2.safetensors"


def lightning_checkpoint(tuned, folder):
    torch.save({"state_dict": old_names(tuned, "")}, folder / "plain.ckpt")
    return folder / "plain.ckpt"


LAYOUTS = [published, model_folder, run_folder, clip_l, first_of_sdxl, original_1, original_2, lightning_checkpoint]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_as_text_encoder(layout, tiny, tuned, tmp_path):
    loaded = Backbone.load("tiny", text_encoder=layout(tuned, tmp_path))
    assert torch.equal(loaded.encode(PROMPTS), tuned.encode(PROMPTS))
    assert not torch.equal(loaded.encode(PROMPTS), tiny.encode(PROMPTS))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_as_a_model(layout, tuned, tmp_path):
    """`run=<the same>`: a text encoder alone is laid over the model that has one of its shape."""
    path = layout(tuned, tmp_path)
    loaded = Backbone.load(path)
    assert torch.equal(loaded.encode(PROMPTS), tuned.encode(PROMPTS))
    again = Backbone.load(**loaded.source)
    assert torch.equal(again.encode(PROMPTS), tuned.encode(PROMPTS)), "its record loads it again"


def test_adapters_of_a_run_as_text_encoder(tiny, tmp_path):
    adapted = Backbone.load("tiny").tune(text_encoder="lora", rank=2)
    for name, parameter in adapted.text_encoder.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.02)
    adapted.save_lora("text_encoder", tmp_path / "run" / "lora" / "text_encoder")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"backbone": {"source": "tiny"}}))
    wanted = adapted.encode(PROMPTS)
    assert not torch.allclose(wanted, tiny.encode(PROMPTS))
    for loaded in (Backbone.load("tiny", text_encoder=tmp_path / "run"), Backbone.load(tmp_path / "run")):
        torch.testing.assert_close(loaded.encode(PROMPTS), wanted, rtol=1e-5, atol=1e-5)


def test_whole_model_folder_as_text_encoder(tiny, tuned):
    tuned = Backbone.load("tiny", text_encoder=TINY)
    assert torch.equal(tuned.encode(PROMPTS), tiny.encode(PROMPTS))


def spoil(state, how):
    state = dict(state)
    if how == "missing":
        del state["text_model.encoder.layers.1.mlp.fc1.bias"]
    elif how == "unknown":
        state["text_model.encoder.layers.9.mlp.fc1.bias"] = torch.zeros(4)
    else:
        state["text_model.encoder.layers.1.mlp.fc1.bias"] = torch.zeros(4)
    return state


@pytest.mark.parametrize("how", ["missing", "unknown", "shape"])
def test_a_key_that_does_not_fit_is_named(how, tuned, tmp_path):
    save_file(spoil(old_names(tuned), how), tmp_path / "odd.safetensors")
    key = "encoder.layers.9.mlp.fc1.bias" if how == "unknown" else "encoder.layers.1.mlp.fc1.bias"
    with pytest.raises(BackboneError, match=rf"odd.safetensors does not fit as text_encoder: {key}"):
        Backbone.load("tiny", text_encoder=tmp_path / "odd.safetensors")


def test_a_folder_with_a_missing_key_is_not_filled_with_random_numbers(tuned, tmp_path):
    folder = model_folder(tuned, tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file(spoil(state, "missing"), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="encoder.layers.1.mlp.fc1.bias"):
        Backbone.load("tiny", text_encoder=folder)


def test_another_width_names_the_key(tmp_path):
    wide = {key: torch.zeros(*(2 * size for size in value.shape)) for key, value in old_names(Backbone.load("tiny")).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(
        BackboneError, match=r"does not fit as text_encoder: embeddings.position_embedding.weight is of shape \(64, 256\)"
    ):
        Backbone.load("tiny", text_encoder=tmp_path / "wide.safetensors")
    with pytest.raises(BackboneError, match="width 256 with 3 layers.*backbone.text_encoder"):
        Backbone.load(tmp_path / "wide.safetensors")


def test_bad_files(tuned, tmp_path):
    whole = clip_l(tuned, tmp_path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    save_file({"some.other.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    torch.save({"epoch": 3, "text_model.x": torch.zeros(1)}, tmp_path / "mixed.pth")
    cases = {
        "cut.safetensors": "truncated or foreign",
        "text.safetensors": "truncated or foreign",
        "text.pth": "truncated or foreign",
        "empty.ckpt": "truncated or foreign",
        "foreign.safetensors": "no CLIP text encoder.*some.other.weight",
        "mixed.pth": "int at 'epoch'",
        "absent.pth": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(WeightsError, match=message):
            read_text_encoder(tmp_path / name)
        with pytest.raises(BackboneError, match=message):
            Backbone.load("tiny", text_encoder=tmp_path / name)
        if name != "absent.pth":
            with pytest.raises(BackboneError, match=message):
                Backbone.load(tmp_path / name)


def test_pickled_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("pickled code was run",))

    torch.save({"text_model.x": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match="truncated or foreign"):
        read_text_encoder(tmp_path / "trap.pth")


def test_a_missing_run(tmp_path):
    with pytest.raises(BackboneError, match="no such folder or file"):
        Backbone.load("tiny", text_encoder=tmp_path / "nowhere")


class TestShipped:
    """The tuned text encoders that ship with the embedded model, by name."""

    def test_a_name_is_a_run(self):
        named, folder = Backbone.load("tiny:aesthetic"), Backbone.load(TUNED / "aesthetic")
        assert torch.equal(named.encode(PROMPTS), folder.encode(PROMPTS))
        assert not torch.equal(named.encode(PROMPTS), Backbone.load("tiny").encode(PROMPTS))
        assert named.base_record["source"] == "tiny" and named.source["run"] == "tiny:aesthetic"
        again = Backbone.load(**named.source)
        assert torch.equal(again.encode(PROMPTS), named.encode(PROMPTS))

    def test_as_text_encoder(self):
        taken = Backbone.load("tiny", text_encoder="tiny:clip")
        assert torch.equal(taken.encode(PROMPTS), Backbone.load("tiny:clip").encode(PROMPTS))

    def test_an_unknown_name_lists_the_known(self):
        assert shipped() == ["tiny:aesthetic", "tiny:clip", "tiny:preference"]
        with pytest.raises(BackboneError, match="no tiny:loud ships .* tiny, tiny:aesthetic, tiny:clip, tiny:preference"):
            Backbone.load("tiny:loud")
