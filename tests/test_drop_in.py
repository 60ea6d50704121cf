"""docs/drop_in.md, example by example, on small random pipelines of the real diffusers classes under the names it uses."""

import re

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tc_lightning.backbone import TINY, Backbone
from tc_lightning.export import Source, export

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
WIDTH = 32


def text_config(tokenizer, **more):
    numbers = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPTextConfig(**numbers, vocab_size=len(tokenizer), max_position_embeddings=32, projection_dim=WIDTH, **more)


def unet(**more):
    numbers = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
    numbers |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return UNet2DConditionModel(**(numbers | {"cross_attention_dim": WIDTH, "attention_head_dim": 4} | more))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which every name of the page is a small random model; exports/mine is a real export of a changed encoder."""
    folder = tmp_path_factory.mktemp("drop_in")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(TINY / "tokenizer"))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    shared = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, "text_encoder": CLIPTextModel(text_config(tokenizer))}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**shared, unet=unet(), **rest)
    pipe.save_pretrained(folder / SD15)
    pipe.save_pretrained(folder / "stable-diffusion-v1-5/stable-diffusion-inpainting")
    control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    torch.nn.init.normal_(control.controlnet_mid_block.weight)
    control.save_pretrained(folder / "lllyasviel/control_v11p_sd15_scribble")
    adapter = {
        "block_out_channels": (32, 64),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 8,
        "motion_num_attention_heads": 2,
    }
    MotionAdapter(**adapter).save_pretrained(folder / "guoyww/animatediff-motion-adapter-v1-5-3")
    second = {"text_encoder_2": CLIPTextModelWithProjection(text_config(tokenizer)), "tokenizer_2": tokenizer}
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + WIDTH}
    xl = StableDiffusionXLPipeline(
        **shared, **second, unet=unet(cross_attention_dim=2 * WIDTH, use_linear_projection=True, **times)
    )
    xl.save_pretrained(folder / "stabilityai/stable-diffusion-xl-base-1.0")
    tuned = Backbone.load(folder / SD15)
    for parameter in tuned.text_encoder.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    original = Backbone.load(folder / SD15).text_encoder
    export(Source(tuned, original, base=SD15), folder / "exports" / "mine")
    for name in ("photo", "scribble"):
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4)).save(folder / "mask.png")
    return folder


def examples() -> dict[str, str]:
    """Heading -> code, of the page."""
    from conftest import ROOT

    page = (ROOT / "docs" / "drop_in.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def shorten(code: str) -> str:
    """Fewer steps and frames, and a seed: nothing else of an example is touched."""
    code = code.replace("num_frames=16", "num_frames=2").replace(", num_inference_steps=25", "")
    options = "num_inference_steps=3, generator=torch.Generator().manual_seed(0)"
    if "Img2Img" not in code and "Inpaint" not in code:
        options += ", height=16, width=16" if "ControlNet" not in code else ""
    return "import torch\n" + re.sub(r'= pipe\((".*?")', rf"= pipe(\1, {options}", code)


def test_the_page_has_them_all():
    assert list(examples()) == ["Text to image", "Image to image", "Inpainting", "ControlNet", "Video: AnimateDiff", "SDXL"]


@pytest.mark.full
@pytest.mark.parametrize("heading", list(examples()))
def test_an_example_runs_and_the_tuned_encoder_counts(heading, place, monkeypatch):
    monkeypatch.chdir(place)
    code = shorten(examples()[heading])
    made = []
    for text in (code, code, code.replace('"exports/mine"', f'"{SD15}"')):
        names: dict = {}
        exec(text, names)  # noqa: S102
        made.append(np.asarray(names["image"], dtype=float))
    tuned, again, original = made
    assert tuned.shape == (16, 16, 3) and tuned.std() > 0
    assert np.array_equal(tuned, again)
    assert not np.array_equal(tuned, original), "the text encoder of the export was used"


@pytest.mark.full
def test_sdxl_reads_the_penultimate_layer_of_the_tuned_encoder(place, monkeypatch):
    monkeypatch.chdir(place)
    tuned = CLIPTextModel.from_pretrained("exports/mine", subfolder="text_encoder")
    pipe = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", text_encoder=tuned)
    embeds = pipe.encode_prompt("a red circle", device="cpu", do_classifier_free_guidance=False)[0]
    tokens = pipe.tokenizer(["a red circle"], padding="max_length", max_length=32, return_tensors="pt").input_ids
    wanted = tuned(tokens, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(embeds[..., :WIDTH], wanted)
    assert not torch.allclose(wanted, tuned(tokens).last_hidden_state)
