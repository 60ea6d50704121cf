"""The real loading code on small models in the real layouts; saving; what a user is told when it fails."""

import copy
import json
import shutil

import pytest
import torch
from small_runs import kept, small_pipeline

import tc_lightning as tc
from tc_lightning.backbone import ARCHITECTURES, BackboneError, save_model

PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    return small_pipeline(folder), folder


def same(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def image(backbone, **options):
    return tc.generate(backbone, ["a red circle"], seeds=[3], steps=3, guidance_scale=3.0, **options)


def test_diffusers_folder_loads_frozen_in_fp32_and_samples_as_its_pipeline(pipeline):
    """PNDM's configuration, as in Stable Diffusion 1.5's repository, becomes the same noise levels; the chain is DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tc_lightning.noise import gaussian

    pipe, folder = pipeline
    backbone = tc.Backbone.load(folder)
    assert all(same(getattr(backbone, part), getattr(pipe, part)) for part in PARTS)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32} and not backbone.training
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert backbone.image_size == 16 and backbone.latent_shape == (4, 8, 8)

    reference = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = reference("a red circle", latents=gaussian([3], (4, 8, 8)), **options).images
    assert (image(backbone) - theirs).abs().max() < 1e-4


def test_embedded_model_is_a_folder_of_diffusers_and_samples_as_its_pipeline():
    from diffusers import StableDiffusionPipeline

    from tc_lightning.backbone import TINY
    from tc_lightning.noise import gaussian

    reference = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = type(reference.scheduler).from_config(reference.scheduler.config, timestep_spacing="trailing")
    prompt, options = "a large red circle on the left", {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "pt"}
    backbone = tc.Backbone.load("tiny")
    theirs = reference(prompt, latents=gaussian([5], backbone.latent_shape), **options).images
    ours = tc.generate(backbone, [prompt], seeds=[5], steps=4, guidance_scale=4.0)
    assert (ours - theirs).abs().max() < 1e-4


def test_variant_files_are_read_into_fp32(pipeline, tmp_path):
    pipe, folder = pipeline
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    with pytest.raises(BackboneError, match="could not read"):
        tc.Backbone.load(tmp_path)
    backbone = tc.Backbone.load(tmp_path, variant="fp16")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert torch.equal(backbone.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float())


@pytest.mark.parametrize("kind", ["Stable Diffusion 1", "Stable Diffusion 2"])
def test_single_file_in_the_original_layout(kind, tmp_path):
    from safetensors.torch import save_file

    from tc_lightning.single_file import text_to_original, unet_to_original, vae_to_original

    two = kind.endswith("2")
    pipe = small_pipeline(tmp_path / "folder", prediction_type="v_prediction" if two else "epsilon", penultimate=two)
    state = unet_to_original(pipe.unet.state_dict()) | vae_to_original(pipe.vae.state_dict())
    state |= text_to_original(pipe.text_encoder.state_dict())
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    assert "model.diffusion_model.input_blocks.0.0.weight" in state and "first_stage_model.decoder.conv_in.weight" in state

    backbone = tc.Backbone.load(file, config=tmp_path / "folder")
    assert all(same(getattr(backbone, part), getattr(pipe, part)) for part in PARTS)
    assert torch.equal(image(backbone), image(tc.Backbone.load(tmp_path / "folder")))
    with pytest.raises(BackboneError, match=r"backbone.config=<diffusers folder>"):
        tc.Backbone.load(file)


def test_v_prediction_and_stable_diffusion_2_text_encoder(tmp_path):
    pipe = small_pipeline(tmp_path, prediction_type="v_prediction", penultimate=True)
    backbone = tc.Backbone.load(tmp_path)
    assert backbone.noise_scheduler.config.prediction_type == "v_prediction"
    assert backbone.text_encoder.config.hidden_act == "gelu" and backbone.text_encoder.config.num_hidden_layers == 1
    assert same(backbone.text_encoder, pipe.text_encoder)
    assert image(backbone).isfinite().all()


def test_a_hub_id_without_network_says_what_to_do(pipeline):
    with pytest.raises(BackboneError, match="from the hub") as caught:
        tc.Backbone.load("nobody/nothing-here")
    for word in ("backbone=local", "HF_TOKEN", "HF_ENDPOINT", "random_weights"):
        assert word in str(caught.value)


def test_a_broken_connection_is_the_same_message(monkeypatch):
    from transformers import CLIPTextModel

    def fail(*args, **kwargs):
        raise ConnectionError("connection reset by peer")

    monkeypatch.setattr(CLIPTextModel, "from_pretrained", fail)
    with pytest.raises(BackboneError, match="connection reset by peer\nWithout network"):
        tc.Backbone.load("nobody/nothing-here")


@pytest.mark.parametrize("source", ["./absent", "/absent/folder", "a/b/c", "absent.safetensors"])
def test_absent_folders_and_files_are_no_hub_ids(source):
    with pytest.raises(BackboneError, match="no such f"):
        tc.Backbone.load(source)


@pytest.mark.parametrize("damage", ["truncated", "missing weight", "no tokenizer"])
def test_damaged_folders_are_refused(damage, pipeline, tmp_path):
    """transformers and diffusers draw what is missing at random and say nothing that is heard."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline[1], tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif damage == "missing weight":
        file = tmp_path / "model" / "text_encoder" / "model.safetensors"
        state = load_file(file)
        state.pop(next(key for key in state if key.endswith("final_layer_norm.weight")))
        save_file(state, file, metadata={"format": "pt"})
    else:
        shutil.rmtree(tmp_path / "model" / "tokenizer")
    with pytest.raises(BackboneError):
        tc.Backbone.load(tmp_path / "model")


def test_a_text_encoder_of_another_width_names_the_key(pipeline, tmp_path):
    small_pipeline(tmp_path / "wide", width=64)
    with pytest.raises(BackboneError, match=r"text_encoder: .*(embedding|weight|bias)"):
        tc.Backbone.load(pipeline[1], text_encoder=tmp_path / "wide" / "text_encoder")


@pytest.mark.parametrize("where", ["whole folder", "part folder"])
def test_a_text_encoder_of_another_folder(where, pipeline, tmp_path):
    other = small_pipeline(tmp_path / "other", seed=1)
    source = tmp_path / "other" / ("text_encoder" if where == "part folder" else "")
    backbone = tc.Backbone.load(pipeline[1], text_encoder=source)
    assert same(backbone.text_encoder, other.text_encoder) and same(backbone.unet, pipeline[0].unet)


def test_saved_text_encoder_has_the_prefix_that_others_look_for(pipeline, tmp_path):
    """Without `text_model.` transformers 4, ComfyUI and A1111 load random weights and say nothing (trap 1)."""
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    model = copy.deepcopy(pipeline[0].text_encoder)
    before = copy.deepcopy(model.state_dict())
    save_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved and all(key.startswith("text_model.") for key in saved)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    again, report = CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and same(again, model)


def test_saving_in_another_dtype_leaves_the_model_alone(pipeline, tmp_path):
    from safetensors.torch import load_file

    model = pipeline[0].unet
    save_model(model, tmp_path, dtype=torch.float16)
    assert model.dtype == torch.float32
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}


@pytest.mark.parametrize(("architecture", "text", "unet"), [("sd15", 123_060_480, 859_520_964), ("sd21", 340_387_840, 865_910_724)])
def test_random_weights_have_the_published_shape(architecture, text, unet):
    """Numbers of parameters as published, counted on the meta device; the VAE is the same in both."""
    with torch.device("meta"):
        backbone = tc.Backbone.load("unused", random_weights=True, architecture=architecture)
    count = {part: sum(parameter.numel() for parameter in getattr(backbone, part).parameters()) for part in PARTS}
    assert count == {"text_encoder": text, "unet": unet, "vae": 83_653_863}
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert backbone.tokenizer.model_max_length == 77
    assert backbone.image_size == {"sd15": 512, "sd21": 768}[architecture]


def test_random_weights_are_a_function_of_the_seed(monkeypatch):
    small = copy.deepcopy(ARCHITECTURES["sd15"])
    small["text_encoder"] |= {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    small["unet"] |= {"cross_attention_dim": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    small["vae"] |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    monkeypatch.setitem(ARCHITECTURES, "small", small)
    state = torch.get_rng_state()
    one, two, other = (tc.Backbone.load("x", random_weights=True, architecture="small", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same(getattr(one, part), getattr(two, part)) for part in PARTS)
    assert not any(same(getattr(one, part), getattr(other, part)) for part in PARTS)
    with pytest.raises(BackboneError, match="accepted are sd15, sd21"):
        tc.Backbone.load("sd3", random_weights=True)


def test_prompts_are_padded_and_cut_as_the_tokenizer_does(pipeline):
    backbone = tc.Backbone.load(pipeline[1])
    long = "a red circle " * 30
    ids = backbone.tokenize(["a red circle", long])
    reference = backbone.tokenizer(["a red circle", long], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (2, 32) and torch.equal(ids, reference)
    assert backbone.token_counts(["a red circle", long]) == [5, 92]


def test_decode_is_the_pipelines(pipeline):
    pipe, folder = pipeline
    backbone = tc.Backbone.load(folder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert torch.allclose(backbone.decode(latents), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_tune_says_what_learns(pipeline):
    load = lambda: tc.Backbone.load(pipeline[1])  # noqa: E731
    names = lambda backbone: {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}  # noqa: E731
    assert names(load().tune()) == {"text_encoder"}
    assert names(load().tune("frozen", "full")) == {"unet"}
    both = load().tune("lora", "lora", rank=2)
    learning = [name for name, parameter in both.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in learning) and names(both) == {"text_encoder", "unet"}
    with pytest.raises(ValueError, match="accepted are full, lora, frozen"):
        load().tune("half")
    with pytest.raises(ValueError, match="nothing learns"):
        load().tune("frozen", "frozen")


def test_lora_begins_as_the_model_is_and_its_seed_draws_it(pipeline):
    backbones = [tc.Backbone.load(pipeline[1]).tune("lora", rank=2, seed=seed) for seed in (0, 0, 1)]
    first, same_seed, other = ({n: p for n, p in b.named_parameters() if "lora_A" in n} for b in backbones)
    assert all(torch.equal(first[name], same_seed[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert torch.allclose(image(backbones[0]), image(tc.Backbone.load(pipeline[1])), atol=1e-6)


@pytest.mark.full
def test_a_run_folder_is_a_model(tmp_path_factory):
    """Its base with what it tuned; as a source, as a text encoder, and as the base of another run."""
    from transformers import CLIPTextModel

    run = kept(tmp_path_factory.getbasetemp() / "finished")
    tuned = CLIPTextModel.from_pretrained(run / "text_encoder")
    base = tc.Backbone.load("tiny")
    assert not same(base.text_encoder, tuned)
    for backbone in (tc.Backbone.load(run), tc.Backbone.load("tiny", text_encoder=run)):
        assert same(backbone.text_encoder, tuned) and same(backbone.unet, base.unet)
    record = tc.Backbone.load(run).source
    assert record["source"] == "tiny" and record["run"] == str(run)
    assert same(tc.Backbone.load(**record).text_encoder, tuned)


def test_an_unfinished_run_folder_says_so(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"backbone": {"source": "tiny"}}))
    with pytest.raises(BackboneError, match="did not finish"):
        tc.Backbone.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"verb": "generate"}))
    with pytest.raises(BackboneError, match="names no backbone"):
        tc.Backbone.load(tmp_path)


@pytest.mark.full
def test_a_run_on_a_run_remembers_both(tmp_path_factory, tmp_path, monkeypatch):
    """Without "run" a record names the base; paths last when the folder that one stands in changes."""
    first = kept(tmp_path_factory.getbasetemp() / "finished")
    other = kept(tmp_path_factory.getbasetemp() / "other", "seed=1", "optimizer.lr=0.01")
    second = tmp_path / "second"
    shutil.copytree(other, second)
    card = json.loads((second / "run.json").read_text())
    monkeypatch.chdir(first.parent)
    card["backbone"] = tc.Backbone.load(first.name).source
    (second / "run.json").write_text(json.dumps(card))
    monkeypatch.chdir(tmp_path)
    model = tc.Backbone.load("second")
    assert same(model.text_encoder, tc.Backbone.load(other).text_encoder)
    assert same(tc.Backbone.load(**model.source).text_encoder, model.text_encoder)
    base = {key: value for key, value in model.source.items() if key != "run"}
    assert same(tc.Backbone.load(**base).text_encoder, tc.Backbone.load(first).text_encoder)
    mixed = tc.Backbone.load(second, text_encoder=first)
    again = tc.Backbone.load(**mixed.source)
    assert same(mixed.text_encoder, again.text_encoder) and same(again.text_encoder, tc.Backbone.load(first).text_encoder)


def test_a_tuned_run_over_a_replaced_text_encoder_is_not_undone(pipeline, tmp_path):
    """A run that began with backbone.text_encoder=... tuned it further; another run begins there."""
    small_pipeline(tmp_path / "start", seed=1)
    tuned = small_pipeline(tmp_path / "tuned", seed=2)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "tuned" / "text_encoder", run / "text_encoder")
    record = tc.Backbone.load(pipeline[1], text_encoder=tmp_path / "start").source
    (run / "run.json").write_text(json.dumps({"backbone": record}))
    model = tc.Backbone.load(run)
    assert same(model.text_encoder, tuned.text_encoder)
    assert same(tc.Backbone.load(**model.source).text_encoder, tuned.text_encoder)
    assert tc.Backbone.load(run, image_size=32).image_size == 32
