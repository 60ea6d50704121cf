"""Exports in an environment of their own with transformers 4.49 and diffusers 0.32: the same embeddings and images there.

The environment is made in a temporary folder, or given: TC_OLD_PYTHON=<python of such an environment>.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel
from tuned_runs import make_run

from tc_lightning.backbone import Backbone
from tc_lightning.export import Source, export

PINS = ["torch==2.13.0", "transformers==4.49.0", "diffusers==0.32.2", "peft==0.14.0", "numpy", "safetensors"]
PROMPTS = ["", "a red circle on the left", "two blue squares on a black background"]
THERE = """
import json, sys
import torch, transformers, diffusers
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
wanted = load_file(f"{folder}/wanted.safetensors")
found = {"transformers": transformers.__version__, "diffusers": diffusers.__version__}


def apart(got, name):
    return float((got - wanted[name]).abs().max())


def image(pipe):
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "latents": wanted["latents"], "output_type": "pt"}
    return pipe(prompts[1], num_inference_steps=4, guidance_scale=4.0, **size).images


with torch.no_grad():
    tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/whole/tokenizer")
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    found["tokens"] = bool((tokens == wanted["tokens"]).all())
    for name, place in (("folder", "whole/text_encoder"), ("alone", "alone"), ("plain", "plain")):
        torch.manual_seed(0)
        encoder = CLIPTextModel.from_pretrained(f"{folder}/{place}").eval()
        found[name] = apart(encoder(tokens).last_hidden_state, "embeds")
    whole = StableDiffusionPipeline.from_pretrained(f"{folder}/whole")
    found["image"] = apart(image(whole), "image")
    single = StableDiffusionPipeline.from_single_file(f"{folder}/one.safetensors", config=f"{folder}/whole", local_files_only=True)
    found["single_file"] = apart(image(single), "image")
    for name in ("pytorch_lora_weights", "kohya"):
        pipe = StableDiffusionPipeline.from_pretrained(f"{folder}/base")
        pipe.load_lora_weights(f"{folder}/lora", weight_name=f"{name}.safetensors")
        found[name] = apart(image(pipe), "lora_image")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    if "TC_OLD_PYTHON" in os.environ:
        return os.environ["TC_OLD_PYTHON"]
    folder = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", *PINS], check=True)
    return str(folder / "bin" / "python")


def pictured(backbone, latents):
    parts = {name: getattr(backbone, name) for name in ("tokenizer", "text_encoder", "vae", "unet")}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(scheduler=backbone.noise_scheduler, **parts, **rest)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "latents": latents, "output_type": "pt"}
    return pipe(PROMPTS[1], num_inference_steps=4, guidance_scale=4.0, **size).images


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_the_same_there(old_python, tmp_path):
    full, lora = make_run(tmp_path / "run", 1, unet=True), make_run(tmp_path / "adapters", 2, lora=True, unet=True)
    tuned, adapted = Source.load(full), Source.load(lora)
    export(tuned, tmp_path / "whole")
    export(tuned, tmp_path / "alone", part="text_encoder")
    export(tuned, tmp_path / "one.safetensors", to="single_file")
    export(adapted, tmp_path / "lora", to="lora")
    export(Source(Backbone.load("tiny"), adapted.original, base="tiny"), tmp_path / "base")
    plain = CLIPTextModel(tuned.backbone.text_encoder.config)  # built, not loaded: transformers 5 then saves without the prefix
    plain.load_state_dict(tuned.backbone.text_encoder.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = {
        "tokens": tuned.backbone.tokenize(PROMPTS),
        "embeds": tuned.backbone.encode(PROMPTS),
        "latents": latents,
        "image": pictured(tuned.backbone, latents),
        "lora_image": pictured(adapted.backbone, latents),
    }
    save_file({key: value.contiguous() for key, value in wanted.items()}, tmp_path / "wanted.safetensors")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [old_python, "-c", THERE, str(tmp_path), json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert found["transformers"].startswith("4.49") and found["diffusers"].startswith("0.32")
    assert found["tokens"]
    assert found["folder"] <= 1e-6 and found["alone"] <= 1e-6
    assert found["image"] <= 1e-4 and found["single_file"] <= 1e-4
    assert found["pytorch_lora_weights"] <= 1e-4 and found["kohya"] <= 1e-4
    assert found["plain"] > 0.1, "the trap: loaded as random weights, without an error"
