"""The tuned window in diffusers' own pipelines, and our sampling with diffusers' schedulers, against each other."""

from contextlib import contextmanager

import diffusers
import pytest
import torch

from tc_lightning.backbone import Backbone
from tc_lightning.conditioning import guidance_pair
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.sampling import SCHEDULERS, Sampler, generate, noise_scheduler
from tc_lightning.window import TunedWindow, callback_on_step_end

PROMPTS = ["a red circle on the left", "a small blue square"]
SEEDS = [3, 4]


@pytest.fixture(scope="module")
def backbone():
    """The embedded model with a text encoder that differs clearly from its original."""
    loaded = Backbone.load("tiny")
    loaded.original = loaded.frozen_text_encoder()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.text_encoder.parameters():
            parameter += 0.3 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return loaded


def pipeline(backbone, kind=diffusers.StableDiffusionPipeline, scheduler="ddim", **parts):
    parts = {"vae": backbone.vae, "unet": backbone.unet, "text_encoder": backbone.original} | parts
    scheduler = noise_scheduler(scheduler, backbone.noise_scheduler, "trailing")
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(tokenizer=backbone.tokenizer, scheduler=scheduler, **parts, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def told(model):
    """What a UNet or ControlNet is told: a list of (t, encoder_hidden_states)."""
    seen = []

    def look(module, arguments, kwargs):
        seen.append((float(arguments[1].flatten()[0]), kwargs["encoder_hidden_states"]))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.fixture
def spy(backbone):
    """What the backbone's UNet is told."""
    with told(backbone.unet) as seen:
        yield seen


def pair(backbone, text_encoder, prompts=PROMPTS):
    with torch.no_grad():
        return guidance_pair(backbone.encode([""], text_encoder), backbone.encode(prompts, text_encoder))


def check_window(backbone, seen, tuned_fraction, prompts=PROMPTS):
    tuned, original = pair(backbone, backbone.text_encoder, prompts), pair(backbone, backbone.original, prompts)
    assert (tuned - original).abs().max() > 0.1
    for t, embeds in seen:
        torch.testing.assert_close(embeds, tuned if t < 1000 * tuned_fraction else original, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tuned_fraction", [0.6, 1.0])
def test_a_pipeline_with_the_callback_makes_our_images(scheduler, tuned_fraction, backbone):
    ours = Sampler(backbone, 5, 4.0, tuned_fraction=tuned_fraction, original=backbone.original, scheduler=scheduler)
    pipe = pipeline(backbone, scheduler=scheduler)
    theirs = pipe(
        **TunedWindow(pipe, backbone.text_encoder, tuned_fraction)(PROMPTS, num_inference_steps=5),
        guidance_scale=4.0,
        latents=gaussian(SEEDS, backbone.latent_shape),
        generator=[torch.Generator().manual_seed(derive_seed(seed, 1)) for seed in SEEDS],
        output_type="pt",
    ).images
    torch.testing.assert_close(ours(PROMPTS, SEEDS), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tuned_fraction", [0.0, 0.28, 0.6])
def test_our_sampling_uses_the_tuned_text_in_its_window(scheduler, tuned_fraction, backbone, spy):
    sampler = Sampler(backbone, 7, 4.0, tuned_fraction=tuned_fraction, original=backbone.original, scheduler=scheduler)
    sampler(PROMPTS, SEEDS)
    assert len(spy) == (8 if scheduler == "pndm" else 7)
    check_window(backbone, spy, tuned_fraction)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(scheduler, backbone):
    sampler = Sampler(backbone, 3, 4.0, scheduler=scheduler)
    alone = torch.cat([sampler([prompt], [seed]) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)])
    torch.testing.assert_close(sampler(PROMPTS, SEEDS), alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler"])
@pytest.mark.parametrize("strength", [0.4, 0.9])
def test_image_to_image(scheduler, strength, backbone, spy):
    pipe = pipeline(backbone, diffusers.StableDiffusionImg2ImgPipeline, scheduler)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    window = TunedWindow(pipe, backbone.text_encoder)
    pipe(**window(PROMPTS, num_inference_steps=10, strength=strength), image=image, guidance_scale=4.0, output_type="pt")
    assert (spy[0][0] < 600) == (strength == 0.4)
    check_window(backbone, spy, 0.6)


def test_the_pipelines_own_default_strength(backbone):
    pipe = pipeline(backbone, diffusers.StableDiffusionImg2ImgPipeline)
    assert TunedWindow(pipe, backbone.text_encoder)("a red circle")["strength"] == 0.8


def test_inpainting(backbone):
    # diffusers inpaints with four latent channels only: the same architecture with those, random weights
    torch.manual_seed(0)
    unet = type(backbone.unet).from_config(backbone.unet.config, in_channels=4, out_channels=4)
    vae = type(backbone.vae).from_config(backbone.vae.config, latent_channels=4)
    pipe = pipeline(backbone, diffusers.StableDiffusionInpaintPipeline, unet=unet.eval(), vae=vae.eval())
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 16:] = 1
    arguments = {"image": image, "mask_image": mask, "height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "pt"}
    for strength in (0.5, 1.0):
        with told(unet) as seen:
            pipe(**TunedWindow(pipe, backbone.text_encoder)(PROMPTS, num_inference_steps=6, strength=strength), **arguments)
        check_window(backbone, seen, 0.6)


def test_controlnet(backbone, spy):
    net = diffusers.ControlNetModel.from_unet(backbone.unet, conditioning_embedding_out_channels=(4, 8, 8)).eval()
    pipe = pipeline(backbone, diffusers.StableDiffusionControlNetPipeline, controlnet=net)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with told(net) as seen:
        pipe(**TunedWindow(pipe, backbone.text_encoder)(PROMPTS, num_inference_steps=5), image=image, guidance_scale=4.0)
    check_window(backbone, spy, 0.6)
    check_window(backbone, seen, 0.6)


def test_several_images_a_prompt_and_no_guidance(backbone, spy):
    pipe = pipeline(backbone)
    window = TunedWindow(pipe, backbone.text_encoder)
    pipe(**window(PROMPTS, num_inference_steps=3, num_images_per_prompt=2), guidance_scale=4.0, output_type="pt")
    check_window(backbone, spy, 0.6, [prompt for prompt in PROMPTS for _ in range(2)])
    spy.clear()
    pipe(**window(PROMPTS, num_inference_steps=3), guidance_scale=1.0, output_type="pt")
    tuned, original = (pair(backbone, encoder)[2:] for encoder in (backbone.text_encoder, backbone.original))
    for t, embeds in spy:
        torch.testing.assert_close(embeds, tuned if t < 600 else original, atol=1e-5, rtol=0)


def test_negative_prompts_are_the_tuned_ones_too(backbone, spy):
    pipe = pipeline(backbone)
    pipe(**TunedWindow(pipe, backbone.text_encoder, 1.0)("a red circle", "a blue square", 2), guidance_scale=4.0, output_type="pt")
    with torch.no_grad():
        wanted = backbone.encode(["a blue square", "a red circle"])
    for _, embeds in spy:
        torch.testing.assert_close(embeds, wanted, atol=1e-5, rtol=0)


def test_generate_takes_a_scheduler(backbone):
    images = generate(backbone, PROMPTS, SEEDS, 2, 4.0, scheduler="euler", batch_size=3)
    sampler = Sampler(backbone, 2, 4.0, scheduler="euler")
    texts = [prompt for prompt in PROMPTS for _ in SEEDS]
    torch.testing.assert_close(images, sampler(texts, SEEDS * 2), atol=1e-4, rtol=0)


def test_refusals(backbone):
    with pytest.raises(ValueError, match="accepted: ddim, pndm, dpm_solver, euler, euler_ancestral"):
        Sampler(backbone, scheduler="ddpm")
    with pytest.raises(ValueError, match="needs the original text encoder"):
        Sampler(backbone, tuned_fraction=0.6)
    with pytest.raises(ValueError, match="tuned_fraction=1.5"):
        callback_on_step_end(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), 1.5)
    pipe = pipeline(backbone)
    with pytest.raises(ValueError, match="takes no strength"):
        TunedWindow(pipe, backbone.text_encoder)("a red circle", strength=0.5)
