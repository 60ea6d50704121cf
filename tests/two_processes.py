"""Run by tests in one process or in several: what a step's gradient, data, noise and rewards are, saved to a file a process.

python two_processes.py <out folder> with torchrun's environment variables, or none for one process.
"""

import os
import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback, Trainer

import tc_lightning as tc
from tc_lightning.prompts import PromptData
from tc_lightning.rewards import tiny as rewards

THINGS = [f"{colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "cross")]
PROMPTS = [f"a {thing}{place}" for thing in THINGS for place in ("", " on the left")]


class Keep(Callback):
    """Gradients, and the rows of each batch."""

    def __init__(self):
        self.gradients, self.rows = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(list(zip(batch["prompts"], batch["seeds"], strict=True)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.requires_grad})


def fit(folder: Path, batch_size: int, accumulate: int = 1, unet: str = "frozen", steps: int = 1, ddpo: bool = False) -> dict:
    """One small run: {"gradients", "rows", "rewards", "logged"}."""
    torch.manual_seed(0)
    backbone = tc.Backbone.load("tiny").tune("full" if unet == "frozen" else "frozen", unet)
    options = {"constraint": rewards.tiny_clip(weight=1.0), "guidance_scale": 1.5}
    options |= {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    reward = tc.RewardMix(preference=rewards.tiny_preference())
    if ddpo:
        module = tc.DDPO(backbone, reward, steps=2, tuned_fraction=1.0, samples_per_prompt=2, kl_weight=0.1, **options)
    else:
        module = tc.TextCraftor(backbone, reward, schedule=tc.LastK(1), steps=2, **options)
    keep = Keep()
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[keep],
        use_distributed_sampler=False,
        default_root_dir=str(folder),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, PromptData(PROMPTS, batch_size=batch_size))
    module.reward.reset()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mine = slice(0, 8) if world == 1 else slice(0, 5) if trainer.global_rank == 0 else slice(5, 8)  # uneven shares
    module.reward(images[mine], PROMPTS[mine])
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return {"gradients": keep.gradients, "rows": keep.rows, "rewards": module.reward.compute(), "logged": logged}


def main(folder: Path) -> None:
    """All cases, into <folder>/<rank>.pt."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    cases = {
        "text": fit(folder, 4 // world, steps=3),
        "accumulated": fit(folder, 2 // world, accumulate=2),
        "unet": fit(folder, 4 // world, unet="full"),
        "ddpo": fit(folder, 4 // world, steps=2, ddpo=True),
    }
    torch.save(cases, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
