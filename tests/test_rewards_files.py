"""Checkpoints that are missing, damaged, dangerous or of another layout: one clear error each, before anything runs."""

import os
import pickle

import pytest
import torch
from reward_checkpoints import (
    MED,
    OPEN_CLIP,
    bert_tokenizer,
    small_clip_folder,
    small_head,
    small_image_reward,
    small_open_clip,
    small_tokenizer,
)
from safetensors.torch import save_file

from tc_lightning.rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore
from tc_lightning.rewards.checkpoints import read_state_dict


class Bomb:
    """A pickle that would make a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return {
        "clip": small_clip_folder(folder / "clip"),
        "tokenizer": small_tokenizer(folder / "tokenizer"),
        "bert": bert_tokenizer(folder / "bert"),
        "folder": folder,
    }


def make(kind, path, files, **options):
    """A reward whose file is `path`."""
    if kind is HPSv2:
        return HPSv2(path, config=OPEN_CLIP, tokenizer=files["tokenizer"], **options)
    if kind is ImageReward:
        return ImageReward(path, config=MED, tokenizer=files["bert"], **options)
    return Aesthetic(path, clip=files["clip"], **options)


WRITERS = {HPSv2: small_open_clip, ImageReward: small_image_reward, Aesthetic: small_head}
KINDS = pytest.mark.parametrize("kind", list(WRITERS))


@KINDS
def test_missing_file(kind, files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint.*nothing.pt"):
        make(kind, tmp_path / "nothing.pt", files)


@KINDS
def test_wrong_hash(kind, files, tmp_path):
    path = WRITERS[kind](tmp_path / "file.pt")
    with pytest.raises(ValueError, match="sha256 .* expected 0000"):
        make(kind, path, files, sha256="0" * 64)


@KINDS
def test_a_pickle_that_runs_code_is_refused_and_not_run(kind, files, tmp_path):
    path, proof = tmp_path / "bomb.pt", tmp_path / "exploded"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(proof)}, protocol=2))
    torch.save({"state_dict": Bomb(proof)}, tmp_path / "zip.pt")
    for file in (path, tmp_path / "zip.pt"):
        with pytest.raises(ValueError, match="refused.*could run code"):
            make(kind, file, files)
    assert not proof.exists()


@KINDS
def test_truncated_file(kind, files, tmp_path):
    path = WRITERS[kind](tmp_path / "file.pt")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole torch checkpoint"):
        make(kind, path, files)
    (tmp_path / "file.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        make(kind, tmp_path / "file.safetensors", files)


@KINDS
def test_no_tensors(kind, files, tmp_path):
    torch.save({"state_dict": [1, 2]}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="no state dict"):
        make(kind, tmp_path / "file.pt", files)


@pytest.mark.parametrize(
    ("kind", "name", "shown"),
    [
        (HPSv2, "visual.transformer.resblocks.1.mlp.c_fc.weight", "vision_model.encoder.layers.1.mlp.fc1.weight"),
        (ImageReward, "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "layer.1.crossattention.self.key.bias"),
        (Aesthetic, "layers.4.bias", "layers.4.bias"),
    ],
)
def test_wrong_layout_names_what_is_missing_and_unexpected(kind, name, shown, files, tmp_path):
    state = read_state_dict(WRITERS[kind](tmp_path / "file.pt"))
    value = state.pop(name)
    prefix = {ImageReward: "blip.text_encoder."}.get(kind, "")
    torch.save({**state, f"{prefix}strange.weight": value}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=f"1 missing: .*{shown}; 1 unexpected: .*strange.weight"):
        make(kind, tmp_path / "file.pt", files)


@KINDS
def test_another_kind_of_file(kind, files, tmp_path):
    torch.save({"unet.weight": torch.zeros(2), "unet.bias": torch.zeros(2)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="layout"):
        make(kind, tmp_path / "file.pt", files)


def test_another_architecture_is_told_by_its_shapes(files, tmp_path):
    path = small_open_clip(tmp_path / "HPS.pt")
    wider = {**OPEN_CLIP, "embed_dim": 32}
    with pytest.raises(ValueError, match=r"of another shape: .*\(24, 32\) instead of \(32, 32\).*config="):
        HPSv2(path, config=wider, tokenizer=files["tokenizer"])


@KINDS
def test_safetensors_score_the_same(kind, files, tmp_path):
    path = WRITERS[kind](tmp_path / "file.pt")
    save_file({name: value.contiguous() for name, value in read_state_dict(path).items()}, tmp_path / "file.safetensors")
    images = torch.rand(2, 3, 40, 30)
    both = [make(kind, file, files)(images, ["red dog", "cat"]) for file in (path, tmp_path / "file.safetensors")]
    assert torch.equal(*both)


def test_folder_with_weights_missing_or_dangerous(files, tmp_path):
    folder = small_clip_folder(tmp_path / "clip")
    state = read_state_dict(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "text_projection.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing: text_projection.weight"):
        PickScore(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused"):
        CLIPScore(folder)
    assert not (tmp_path / "exploded").exists()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="no file named"):
        CLIPScore(folder)


def test_tokenizer_that_does_not_belong(files, tmp_path):
    path = small_open_clip(tmp_path / "HPS.pt", config=OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"vocab_size": 500}})
    with pytest.raises(ValueError, match="do not belong together"):
        HPSv2(path, config=OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"vocab_size": 500}}, tokenizer=files["tokenizer"])
    with pytest.raises(ValueError, match="tokenizer="):
        CLIPScore(small_open_clip(tmp_path / "open.pt"), config=OPEN_CLIP)


def test_aesthetic_head_of_another_width(files, tmp_path):
    with pytest.raises(ValueError, match="width 30, but the CLIP .* gives 24"):
        Aesthetic(small_head(tmp_path / "head.pth", (30, 16, 8, 8, 4, 1)), clip=files["clip"])


def test_without_a_network(monkeypatch):
    """The tests run offline: a hub id says which file it could not get and what to give instead."""
    with pytest.raises(OSError, match=r"HPS_v2.1_compressed.pt of xswu/HPSv2 .*checkpoint=<local file>"):
        HPSv2(version="2.1", revision="no-such-revision")
    with pytest.raises(OSError, match=r"ImageReward.pt of someone/else"):
        ImageReward("someone/else")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda files: HPSv2(version="3.0"), "2.0, 2.1"),
        (lambda files: CLIPScore(files["clip"], preprocess="bilinear"), "scorer, avgpool"),
        (lambda files: CLIPScore(files["clip"], dtype="int8"), "bfloat16"),
        (lambda files: make_open_clip(files, "ViT-Z"), "ViT-H-14"),
        (
            lambda files: make_open_clip(files, {"embed_dim": 8, "vision_cfg": {"timm_model_name": "x"}, "text_cfg": {}}),
            "timm_model_name",
        ),
    ],
)
def test_options_that_do_not_exist(build, message, files):
    with pytest.raises(ValueError, match=message):
        build(files)


def make_open_clip(files, config):
    path = files["folder"] / "open_clip.pt"
    return CLIPScore(path if path.exists() else small_open_clip(path), config=config, tokenizer=files["tokenizer"])


def test_open_clip_config_from_a_file_and_by_name(files, tmp_path):
    import json

    from tc_lightning.rewards.openclip import open_clip_config

    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    by_file = make_open_clip(files, tmp_path / "open_clip_config.json")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(by_file(images, ["a"]), make_open_clip(files, OPEN_CLIP)(images, ["a"]))
    giant = open_clip_config("ViT-g-14")
    assert (giant.vision_config.intermediate_size, giant.vision_config.num_attention_heads) == (6144, 16)
    assert open_clip_config("ViT-L-14-quickgelu").text_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(("name", "millions"), [("ViT-L-14-quickgelu", 427.62), ("ViT-H-14", 986.11), ("ViT-g-14", 1366.68)])
def test_published_architectures_convert_whole(name, millions):
    """Every name and shape of open_clip's model has its place in transformers', and the sizes are open_clip's own table's."""
    from reward_checkpoints import open_clip_shapes
    from transformers import CLIPModel

    from tc_lightning.rewards.checkpoints import check_layout
    from tc_lightning.rewards.openclip import ARCHITECTURES, convert, open_clip_config

    shapes = open_clip_shapes({**ARCHITECTURES[name], "vision_cfg": {"mlp_ratio": 4.0, **ARCHITECTURES[name]["vision_cfg"]}})
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.01)
    with torch.device("meta"):
        check_layout(CLIPModel(open_clip_config(name)).state_dict(), convert(state, name), name)


def test_image_reward_at_its_published_size():
    from reward_checkpoints import image_reward_shapes
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    from tc_lightning.rewards.blip import MED_CONFIG, TEXT, VISION, _text_config, _vision_config, _vision_names
    from tc_lightning.rewards.checkpoints import check_layout

    large = {"vision_width": 1024, "vision_layers": 24, "image_size": 224, "patch_size": 16}
    shapes = image_reward_shapes({**MED_CONFIG, **large})
    parts = {
        prefix: {name.removeprefix(prefix): torch.empty(s, device="meta") for name, s in shapes.items() if name.startswith(prefix)}
        for prefix in (VISION, TEXT)
    }
    config = _vision_config(parts[VISION], MED_CONFIG, "ImageReward.pt")
    assert (config.num_attention_heads, config.image_size, config.num_hidden_layers) == (16, 224, 24)
    with torch.device("meta"):
        check_layout(BlipVisionModel(config).state_dict(), _vision_names(parts[VISION]), VISION)
        text = BlipTextModel(_text_config(MED_CONFIG, 1024), add_pooling_layer=False)
        check_layout(text.state_dict(), parts[TEXT], TEXT)
