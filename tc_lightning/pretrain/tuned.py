"""Stage 7: three text encoders of the embedded model, each tuned with another reward, as LoRA runs that ship with it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tc_lightning.backbone import Backbone
from tc_lightning.module import TextCraftor
from tc_lightning.pretrain.stage import Workshop
from tc_lightning.prompts import PromptData, fixed_seed
from tc_lightning.rewards.aesthetic import Aesthetic
from tc_lightning.rewards.clip import CLIPScore
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.oracle import Oracle
from tc_lightning.rewards.pickscore import PickScore
from tc_lightning.sampling import generate
from tc_lightning.schedules import FullChain
from tc_lightning.tiny.model import SAMPLING
from tc_lightning.tiny.shapes import captions

# name: weight of its reward, weight of the CLIP constraint, steps. The aesthetic weight lies between two that were tried on 96 dev
# prompts, 60 steps each: at 1 the rating was 4.74 and strict obedience .56, at 8 they were 5.16 and .29
STYLES = {"preference": (1.0, 30.0, 80), "aesthetic": (4.0, 30.0, 50), "clip": (30.0, 0.0, 50)}
RANK, LEARNING_RATE, WARMUP = 8, 1e-3, 15
HELDOUT = 128  # prompts that the shipped files are measured on


def train_tuned(shop: Workshop) -> None:
    """One LoRA run a style in tuned/<style>/; figures are means over held-out prompts, of the base and of each reloaded run."""
    for style in STYLES:
        if not (shop.folder / "tuned" / style / "run.json").exists():
            tune(shop, style)
    figures = {}
    for style in ("base", *STYLES):
        backbone = Backbone.load(shop.folder if style == "base" else shop.folder / "tuned" / style)
        figures |= {f"{style}_{name}": value for name, value in measure(shop, backbone, shop.steps(HELDOUT)).items()}
    shop.finish("tuned", **figures)


def reward_of(folder: Path, style: str, weight: float) -> PickScore | Aesthetic | CLIPScore:
    """The reward of a style on the checkpoints of a model folder."""
    if style == "preference":
        return PickScore(folder / "preference", processor=folder / "preference", weight=weight, name="tiny_preference")
    if style == "aesthetic":
        return Aesthetic(folder / "aesthetic.pth", clip=folder / "clip", weight=weight, name="tiny_aesthetic")
    return CLIPScore(folder / "clip", weight=weight, name="tiny_clip")


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then cosine decay to nothing."""
    from diffusers.optimization import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)


def tune(shop: Workshop, style: str) -> None:
    """Train the adapters of one style through the full chain and keep them in fp16."""
    weight, held, steps = STYLES[style]
    steps = shop.steps(steps)
    backbone = Backbone.load(shop.folder).tune(text_encoder="lora", rank=RANK, seed=shop.seed)
    module = TextCraftor(
        backbone,
        RewardMix({f"tiny_{style}": reward_of(shop.folder, style, weight)}),
        constraint=reward_of(shop.folder, "clip", held) if held else None,
        schedule=FullChain(),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE),
        lr_scheduler=partial(cosine, steps=steps),
        keep_activations="all",
        tuned_fraction=1.0,
        **SAMPLING,
    )
    shop.say(f"tuned: {style}, {steps} steps")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, gradient_clip_val=1.0, use_distributed_sampler=False, **quiet)
    data = PromptData.shapes(dev=0, heldout=0, seed=shop.seed)
    trainer.fit(module, data)
    keep(backbone, shop.folder / "tuned" / style, style, steps, steps * data.batch_size)


def keep(backbone: Backbone, folder: Path, style: str, steps: int, samples: int) -> None:
    """A small folder that is a run to every verb: adapters in fp16 and run.json, whose base is the folder it lies in."""
    place = folder / "lora" / "text_encoder"
    backbone.save_lora("text_encoder", place)
    file = place / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)
    config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": None, "target_modules": sorted(config["target_modules"])}
    (place / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weight, held, _ = STYLES[style]
    record = {
        "verb": "train",
        "status": "finished",
        "backbone": {"source": "../.."},
        "tuned_fraction": 1.0,
        "steps": steps,
        "samples": samples,
        "config": {"chain": SAMPLING, "reward": {f"tiny_{style}": {"weight": weight}}},
    }
    if held:
        target = "tc_lightning.rewards.tiny.tiny_clip"
        record["config"]["constraint"] = {"constraint": {"_target_": target, "weight": held}}
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(shop: Workshop, backbone: Backbone, count: int) -> dict[str, Tensor]:
    """Mean of every style's reward and of the oracle over `count` held-out prompts, one fixed seed each."""
    prompts = captions(count, 0, "heldout")
    rewards = {f"tiny_{style}": reward_of(shop.folder, style, 1.0) for style in STYLES} | {"strict": Oracle()}
    images = torch.cat([generate(backbone, [prompt], [fixed_seed(row)], **SAMPLING) for row, prompt in enumerate(prompts)])
    with torch.no_grad():
        return {name: reward.score(images, prompts).mean() for name, reward in rewards.items()}
