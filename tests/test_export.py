"""Exports through the libraries that people load them with: the same image comes back, and an old export is never half gone."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from tuned_runs import CHAIN, make_run

import tc_lightning as tc
from tc_lightning import single_file
from tc_lightning.backbone import ARCHITECTURES, TINY, Backbone, save_model
from tc_lightning.cli import main
from tc_lightning.export import ExportError, Source, export, upload
from tc_lightning.pixels import load_png

PROMPT = ["a red circle on the left"]
# sha256 of the sorted lines "name [shape]" of the published v1-5-pruned-emaonly file's three parts: 686, 248 and 197 tensors.
PUBLISHED = {
    "unet": "8c2cafd295071b39e19613339f72e2cd3530e8317a7ac23263132b5c8cfe52a4",
    "vae": "e9d56f72afb2bd81acba4f3ebcb7806ba50f82607dd976f1f7fe674712c1b01b",
    "text_encoder": "0b6ba4295bba7fbdac16998fbcb6fb95e91e046d69ec2355a38a50bc5e197bbe",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that tuned the whole text encoder and UNet, with the paper's window."""
    return make_run(tmp_path_factory.mktemp("runs") / "full", 1, tuned_fraction=0.6, unet=True)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "lora", 2, lora=True, unet=True)


def picture(backbone):
    return tc.generate(backbone, PROMPT, [3], **CHAIN)


def pipeline_picture(pipe, prompt=PROMPT[0], guidance_scale=4.0):
    """Through diffusers' own sampling loop, its scheduler as the file says."""
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3))
    size = {"height": 32, "width": 32, "latents": latents, "output_type": "pt"}
    return pipe(prompt, num_inference_steps=4, guidance_scale=guidance_scale, **size).images


def pipeline_of(backbone):
    parts = {name: getattr(backbone, name) for name in ("tokenizer", "text_encoder", "vae", "unet")}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(scheduler=backbone.noise_scheduler, **parts, **rest)


class TestPublishedKeys:
    """At Stable Diffusion 1.5's sizes, without weights."""

    @pytest.fixture(scope="class")
    def models(self):
        numbers = ARCHITECTURES["sd15"]
        with torch.device("meta"):
            return {
                "unet": UNet2DConditionModel(**numbers["unet"]),
                "vae": AutoencoderKL(**numbers["vae"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig(**numbers["text_encoder"])),
            }

    @pytest.fixture(scope="class")
    def original(self, models):
        convert = {"unet": single_file.unet_to_original, "vae": single_file.vae_to_original}
        convert["text_encoder"] = single_file.text_to_original
        return {part: convert[part](model.state_dict()) for part, model in models.items()}

    @pytest.mark.parametrize("part", PUBLISHED)
    def test_names_and_shapes_are_the_published_ones(self, part, original):
        lines = sorted((key, list(value.shape)) for key, value in original[part].items())
        digest = hashlib.sha256("\n".join(f"{key} {shape}" for key, shape in lines).encode()).hexdigest()
        assert digest == PUBLISHED[part], lines[:3]

    def test_some_published_names(self, original):
        """Names that tools look for to tell which model a file holds."""
        assert "model.diffusion_model.output_blocks.5.2.conv.weight" in original["unet"]
        assert "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight" in original["unet"]
        assert "first_stage_model.decoder.up.1.block.0.nin_shortcut.weight" in original["vae"]
        assert "cond_stage_model.transformer.text_model.embeddings.position_ids" in original["text_encoder"]
        assert sum(map(len, original.values())) == 1131

    def test_diffusers_converts_them_back(self, models, original):
        unet = convert_ldm_unet_checkpoint(original["unet"], dict(models["unet"].config))
        assert {k: v.shape for k, v in unet.items()} == {k: v.shape for k, v in models["unet"].state_dict().items()}
        vae = convert_ldm_vae_checkpoint(original["vae"], dict(models["vae"].config))
        assert {k: v.shape for k, v in vae.items()} == {k: v.shape for k, v in models["vae"].state_dict().items()}

    def test_stable_diffusion_2(self):
        """Its text encoder is OpenCLIP's: q, k and v in one matrix; diffusers converts it back."""
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

        small = CLIPTextConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=100)
        model = CLIPTextModel(small)
        state = single_file.text_to_original(model.state_dict(), open_clip=True)
        assert "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight" in state
        back = convert_open_clip_checkpoint(model, state)
        for key, value in model.state_dict().items():
            assert torch.equal(back[f"text_model.{key}"], value), key

    def test_an_unknown_key_is_named(self, models):
        state = dict(models["unet"].state_dict()) | {"add_embedding.linear_1.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match="no place for the UNet's add_embedding.linear_1.weight"):
            single_file.unet_to_original(state)


@pytest.mark.full
class TestDiffusers:
    @pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
    def test_a_whole_pipeline(self, dtype, full, tmp_path):
        made = export(Source.load(full), tmp_path / "out", dtype=dtype)
        loaded = Backbone.load(tmp_path / "out")
        wanted = Backbone.load(full)
        if dtype == "fp32":
            assert made.rounding == 0.0 and torch.equal(picture(loaded), picture(wanted))
        else:
            assert 0 < float((picture(loaded) - picture(wanted)).abs().max()) < 0.2
        tensors = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
        assert {value.dtype for value in tensors.values()} == {
            {"fp32": torch.float32, "fp16": torch.float16}.get(dtype, torch.bfloat16)
        }
        assert all(key.startswith("text_model.") for key in tensors), "else transformers 4 loads random weights and says nothing"
        assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {file.name for file in (tmp_path / "out" / "tokenizer").iterdir()}

    def test_diffusers_gives_the_same_image(self, full, tmp_path):
        export(Source.load(full), tmp_path / "out")
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
        assert torch.equal(pipeline_picture(pipe), pipeline_picture(pipeline_of(Backbone.load(full))))

    def test_as_a_run_it_keeps_its_window(self, full, tmp_path, monkeypatch):
        """An export named as run= samples as the run does: its chain, and the original text encoder outside the window."""
        export(Source.load(full), tmp_path / "out")
        monkeypatch.chdir(tmp_path)
        for number, source in enumerate((full, tmp_path / "out")):
            words = ["generate", f"run={source}", "text=[a red circle on the left]", "seeds=[3]", f"hydra.run.dir={number}"]
            monkeypatch.setattr(sys, "argv", ["tc_lightning", *words])
            main()
        ours, theirs = (load_png(tmp_path / str(number) / "images" / "0000_3.png") for number in (0, 1))
        assert torch.equal(ours, theirs)
        tuned = Backbone.load(full)
        assert not torch.equal(ours, (picture(tuned)[0] * 255).round() / 255), "the window makes a difference here"
        assert Backbone.load(tmp_path / "out").base_record is not None and Backbone.load("tiny").base_record is None
        again = Source.load(tmp_path / "out")
        assert again.run["tuned_fraction"] == 0.6 and again.base == "tiny"
        assert torch.equal(tuned.encode(PROMPT, again.original), Backbone.load("tiny").encode(PROMPT))

    def test_the_text_encoder_alone(self, full, tmp_path):
        export(Source.load(full), tmp_path / "te", part="text_encoder")
        loaded = Backbone.load("tiny", text_encoder=tmp_path / "te")
        assert torch.equal(loaded.encode(PROMPT), Backbone.load(full).encode(PROMPT))

    def test_adapters_are_merged(self, lora, tmp_path):
        export(Source.load(lora), tmp_path / "out")
        assert torch.equal(picture(Backbone.load(tmp_path / "out")), picture(Backbone.load(lora)))
        assert not any("lora" in key for key in load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"))

    def test_the_safety_checker_and_licence_are_carried_along(self, full, tmp_path):
        base = tmp_path / "base"
        for name in ("safety_checker", "feature_extractor"):
            (base / name).mkdir(parents=True)
            (base / name / "config.json").write_text("{}")
        (base / "LICENSE.md").write_text("as it was")
        source = Source.load(full)
        source.base = str(base)
        export(source, tmp_path / "out")
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"] and index["requires_safety_checker"]
        assert (tmp_path / "out" / "safety_checker" / "config.json").is_file()
        assert (tmp_path / "out" / "LICENSE.md").read_text() == "as it was"

    def test_no_machine_path_in_it(self, full, lora, tmp_path):
        export(Source.load(full), tmp_path / "out")
        export(Source.load(lora), tmp_path / "lora", to="lora")
        for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")]:
            assert str(TINY.parent) not in file.read_text(), file


class TestSingleFile:
    def test_a_whole_checkpoint_through_diffusers(self, full, tmp_path):
        export(Source.load(full), tmp_path / "mine.safetensors", to="single_file")
        loaded = Backbone.load(tmp_path / "mine.safetensors", config=TINY)
        assert torch.equal(picture(loaded), picture(Backbone.load(full)))
        state = load_file(tmp_path / "mine.safetensors")
        tops = {".".join(key.split(".")[:2]) for key in state}
        assert {"model.diffusion_model", "cond_stage_model.transformer"} <= tops
        with safe_open(tmp_path / "mine.safetensors", "pt") as file:
            assert json.loads(file.metadata()["tc_lightning"])["tuned_fraction"] == 0.6

    def test_half_precision(self, full, tmp_path):
        export(Source.load(full), tmp_path / "mine.safetensors", to="single_file", dtype="fp16")
        kinds = {value.dtype for key, value in load_file(tmp_path / "mine.safetensors").items() if "position_ids" not in key}
        assert kinds == {torch.float16}

    def test_clip_l(self, full, tmp_path):
        export(Source.load(full), tmp_path / "clip_l.safetensors", to="single_file", part="text_encoder")
        assert "text_model.encoder.layers.0.mlp.fc1.weight" in load_file(tmp_path / "clip_l.safetensors")  # what ComfyUI looks for
        loaded = Backbone.load("tiny", text_encoder=tmp_path / "clip_l.safetensors")
        assert torch.equal(loaded.encode(PROMPT), Backbone.load(full).encode(PROMPT))


@pytest.mark.full
class TestLora:
    @pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "kohya.safetensors"])
    def test_load_lora_weights_merged_and_unmerged(self, name, lora, tmp_path):
        export(Source.load(lora), tmp_path / "out", to="lora")
        pipe = pipeline_of(Backbone.load("tiny"))
        before = pipeline_picture(pipe)
        pipe.load_lora_weights(str(tmp_path / "out"), weight_name=name)
        unmerged = pipeline_picture(pipe)
        merged = pipeline_picture(pipeline_of(Backbone.load(lora)))
        torch.testing.assert_close(unmerged, merged, rtol=0, atol=1e-4)
        assert float((merged - before).abs().max()) > 0.01
        pipe.unload_lora_weights()
        assert torch.equal(pipeline_picture(pipe), before)

    def test_peft_folder(self, lora, tmp_path):
        export(Source.load(lora), tmp_path / "out", to="lora")
        model = PeftModel.from_pretrained(Backbone.load("tiny").text_encoder, tmp_path / "out" / "text_encoder")
        tokens = Backbone.load("tiny").tokenize(PROMPT)
        merged = Backbone.load(lora).encode(PROMPT)
        torch.testing.assert_close(model(tokens).last_hidden_state, merged, rtol=1e-5, atol=1e-5)

    def test_kohya_names(self, lora, tmp_path):
        export(Source.load(lora), tmp_path / "out", to="lora")
        state = load_file(tmp_path / "out" / "kohya.safetensors")
        for end in ("lora_down.weight", "lora_up.weight", "alpha"):
            assert f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{end}" in state
            assert f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.{end}" in state
        assert float(state["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"]) == 2

    def test_whole_weights_as_adapters(self, tmp_path):
        """At full rank a change of the matrices is exact; norms and embeddings are put back, for their change would be lost."""
        run = make_run(tmp_path / "run", 5)
        source = Source.load(run)
        changed, was = source.backbone.text_encoder.state_dict(), source.original.state_dict()
        for key, value in changed.items():
            if not key.startswith("encoder.layers") or "norm" in key or key.endswith("bias"):
                value.copy_(was[key])
        made = export(source, tmp_path / "out", to="lora", lora_rank=128)
        assert made.rounding < 1e-3
        rough = export(source, tmp_path / "rough", to="lora", lora_rank=1)
        assert rough.rounding > made.rounding

    def test_whole_weights_need_a_rank(self, full, tmp_path):
        with pytest.raises(ExportError, match="lora_rank=16"):
            export(Source.load(full), tmp_path / "out", to="lora")
        with pytest.raises(ExportError, match="whole UNet"):
            export(Source.load(full), tmp_path / "out", to="lora", lora_rank=2)
        assert not any(tmp_path.iterdir()), "nothing is left of a refused export"


@pytest.mark.full
class TestHub:
    def test_folder_and_card(self, full, tmp_path):
        (full / "samples").mkdir(exist_ok=True)
        (full / "samples" / "before_after.png").write_bytes(b"png")
        (full / "scores.csv").write_text("model,prompt\n")
        export(Source.load(full), tmp_path / "mine", to="hub", dtype="fp16")
        card = (tmp_path / "mine" / "README.md").read_text()
        for part in (
            "license: apache-2.0",
            "1 x tiny_preference",
            "constraint 2 x CLIP",
            "| tiny_clip | 0.2500 | 0.5000 |",
            "before_after.png",
            "t < 600",
            "ConditioningSetTimestepRange",
            "start 0.000, end 0.400",
        ):
            assert part in card, part
        assert (tmp_path / "mine" / "scores.csv").is_file() and (tmp_path / "mine" / "before_after.png").is_file()
        assert json.loads((tmp_path / "mine" / "textcraftor.json").read_text())["tuned_fraction"] == 0.6

    def test_the_cards_code_is_our_window(self, full, tmp_path, monkeypatch):
        """The example of the card, run as it stands, gives the image of our own chain with the same window."""
        export(Source.load(full), tmp_path / "mine", to="hub")
        card = (tmp_path / "mine" / "README.md").read_text()
        code = card.split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(code.replace(".images[0]", ".images").replace("generator=", 'output_type="pt", generator='), names)  # noqa: S102
        tuned = Backbone.load(full)
        original = Backbone.load("tiny").text_encoder
        wanted = tc.generate(tuned, PROMPT, [0], **CHAIN, tuned_fraction=0.6, original=original)
        torch.testing.assert_close(names["image"], wanted, rtol=0, atol=1e-4)
        whole = tc.generate(tuned, PROMPT, [0], **CHAIN)
        assert float((whole - wanted).abs().max()) > 1e-3, "the window makes a difference here"

    def test_nothing_is_sent_without_a_yes(self, tmp_path):
        asked = []
        assert not upload(tmp_path, "someone/mine", lambda question: asked.append(question))
        assert "someone/mine" in asked[0] and "private" in asked[0]

    def test_no_network(self, tmp_path):
        with pytest.raises(ExportError, match="hf upload someone/mine"):
            upload(tmp_path, "someone/mine", lambda question: True)


@pytest.mark.full
class TestOldExportStaysWhole:
    def test_replaced_by_a_good_one(self, full, lora, tmp_path):
        export(Source.load(full), tmp_path / "out")
        export(Source.load(lora), tmp_path / "out")
        assert torch.equal(picture(Backbone.load(tmp_path / "out")), picture(Backbone.load(lora)))
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize(("out", "to"), [("out", "diffusers"), ("out.safetensors", "single_file")])
    def test_full_disk(self, out, to, full, lora, tmp_path):
        """A limit on the size of files is what the system offers in place of a full disk: the write itself fails."""
        export(Source.load(full), tmp_path / out, to=to)
        source, limits = Source.load(lora), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            with pytest.raises(ExportError, match="could not write .*; the export that was there is whole"):
                export(source, tmp_path / out, to=to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        options = {} if to == "diffusers" else {"config": TINY}
        assert torch.equal(picture(Backbone.load(tmp_path / out, **options)), picture(Backbone.load(full)))
        assert [path.name for path in tmp_path.iterdir()] == [out]

    def test_killed_between_the_renames(self, full, lora, tmp_path):
        """The old export stands aside and the new one has not its name yet: the next export puts the old one back."""
        export(Source.load(full), tmp_path / "out")
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        os.replace(tmp_path / "out", tmp_path / f".old-{dead.pid}-out")
        (tmp_path / f".part-{dead.pid}-out").mkdir()
        (tmp_path / f".part-{os.getpid()}-other").mkdir()
        with pytest.raises(ExportError, match="lora_rank"):
            export(Source.load(full), tmp_path / "out", to="lora")
        assert torch.equal(picture(Backbone.load(tmp_path / "out")), picture(Backbone.load(full)))
        assert {path.name for path in tmp_path.iterdir()} == {"out", f".part-{os.getpid()}-other"}, "of others nothing is touched"

    def test_killed_while_it_writes(self, full, tmp_path):
        """SIGKILL in the middle: the old export is whole, and the next one leaves nothing of the killed one."""
        export(Source.load(full), tmp_path / "out.safetensors", to="single_file")
        before = (tmp_path / "out.safetensors").read_bytes()
        code = (
            "import os, signal, sys; from tc_lightning import pipeline_files; from tc_lightning.export import Source, export\n"
            "pipeline_files.read_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
            "export(Source.load(sys.argv[1]), sys.argv[2], to='single_file')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(full), str(tmp_path / "out.safetensors")])
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "out.safetensors").read_bytes() == before
        export(Source.load(full), tmp_path / "out.safetensors", to="single_file", dtype="fp16")
        assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]

    def test_other_images_are_not_kept(self, full, tmp_path, monkeypatch):
        """A writer that loses a weight is found out by the comparison."""
        export(Source.load(full), tmp_path / "out.safetensors", to="single_file")
        before = (tmp_path / "out.safetensors").read_bytes()
        real = single_file.unet_to_original
        monkeypatch.setattr(single_file, "unet_to_original", lambda state: {k: v * 0.9 for k, v in real(state).items()})
        with pytest.raises(ExportError, match="gives other images when read back"):
            export(Source.load(full), tmp_path / "out.safetensors", to="single_file")
        assert (tmp_path / "out.safetensors").read_bytes() == before

    def test_what_is_not_ours_is_left_alone(self, full, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        save_file({"a": torch.zeros(1)}, tmp_path / "theirs.safetensors")
        for out, to in (("out", "diffusers"), ("theirs.safetensors", "single_file")):
            with pytest.raises(ExportError, match="no export of ours"):
                export(Source.load(full), tmp_path / out, to=to)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "to=onnx, accepted: diffusers, single_file, lora, hub"),
        ({"dtype": "int8"}, "dtype=int8, accepted: fp32, fp16, bf16"),
        ({"part": "vae"}, "part=vae, accepted"),
        ({"to": "single_file"}, "writes a .safetensors file"),
    ],
)
def test_settings_that_do_not_exist(options, message, full, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(Source.load(full), tmp_path / "out", **options)


@pytest.mark.full
def test_the_verb(full, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["export", f"run={full}", "to=single_file", "dtype=fp16", f"out={tmp_path / 'mine.safetensors'}"]
    monkeypatch.setattr(sys, "argv", ["tc_lightning", *command])
    main()
    said = capsys.readouterr().out
    assert "the same image" in said and "start 0.000, end 0.400" in said
    assert (tmp_path / "mine.safetensors").is_file()


class AsInTransformers4(nn.Module):
    """The names that transformers 4 looks for: the text model is one level deeper."""

    def __init__(self, config):
        super().__init__()
        self.text_model = CLIPTextModel(config)


def test_the_silent_trap(tmp_path):
    """transformers 5 saves an encoder that was built, not loaded, under names that transformers 4 does not know.

    Its `from_pretrained` then keeps the random weights and only logs that. tests/test_export_old_libraries.py shows it there.
    """
    config = Backbone.load("tiny").text_encoder.config
    encoder = CLIPTextModel(config)
    encoder.save_pretrained(tmp_path / "plain")
    save_model(encoder, tmp_path / "ours")
    plain, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "ours"))
    there = AsInTransformers4(config)
    untouched = {key: value.clone() for key, value in there.state_dict().items()}
    report = there.load_state_dict(plain, strict=False)
    assert set(report.missing_keys) == set(untouched) and set(report.unexpected_keys) == set(plain)
    assert all(torch.equal(value, untouched[key]) for key, value in there.state_dict().items()), "random as before"
    there.load_state_dict(ours)
    assert all(torch.equal(value, encoder.state_dict()[key]) for key, value in there.text_model.state_dict().items())
