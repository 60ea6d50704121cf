"""One step of TRL 0.23.1's AlignProp in a process of its own; prints one line of JSON. Not to be called by hand.

It runs in an environment of its own (docs/performance.md says how to make it): UNet LoRA of rank 4 on the same model, chain, batch
and reward as benchmarks/measure.py. TRL recomputes every step in backward; it has no setting that keeps activations.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.filterwarnings("ignore")

from measure import Clock  # noqa: E402
from models import PROMPTS, Tower, make_backbone  # noqa: E402


def make_trainer(a: argparse.Namespace, backbone, folder: str):
    """AlignPropTrainer over the model as a diffusers folder."""
    from accelerate import PartialState
    from diffusers import StableDiffusionPipeline
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # TRL logs before it makes one
    parts = {name: getattr(backbone, name) for name in ("tokenizer", "text_encoder", "vae", "unet")}
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, scheduler=backbone.noise_scheduler, **none).save_pretrained(folder)
    config = AlignPropConfig(
        mixed_precision="no",
        sample_num_steps=a.steps,
        sample_guidance_scale=a.guidance,
        sample_eta=0.0,
        train_batch_size=a.batch,
        train_gradient_accumulation_steps=1,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=a.steps - a.k,
        save_freq=10**6,
    )
    tower = Tower(a.size).to(a.device).requires_grad_(False)
    number = iter(range(10**9))
    return AlignPropTrainer(
        config,
        lambda images, prompts, metadata: (tower(images), {}),
        lambda: (PROMPTS[next(number) % len(PROMPTS)], {}),
        DefaultDDPOStableDiffusionPipeline(folder, use_lora=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("trl",))
    for name, default in (("size", "tiny"), ("device", "cpu")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("steps", 25), ("k", 5), ("batch", 2), ("warmup", 1), ("measured", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=7.5)
    a, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(a, make_backbone(a.size), folder)
    clock = Clock(a, trainer.sd_pipeline)
    for number in range(a.warmup):
        trainer.step(0, number)
    clock.start()
    for number in range(a.warmup, a.warmup + a.measured):
        trainer.step(0, number)
    clock.stop()
    print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
