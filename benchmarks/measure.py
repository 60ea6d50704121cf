"""One row of benchmarks/speed.py in a process of its own; prints one line of JSON. Not to be called by hand."""

from __future__ import annotations

import argparse
import json
import resource
import time
import warnings

import torch
from models import PROMPTS, Tower, make_backbone
from naive import NaiveLoop
from pytorch_lightning import Trainer

import tc_lightning as tc
from tc_lightning.noise import gaussian
from tc_lightning.precision import speed_up
from tc_lightning.prefix import PrefixCache
from tc_lightning.prompts import PromptData


class Count:
    """Calls of the UNet: all, under gradient, and rows; weight gradients that frozen networks got."""

    def __init__(self, unet) -> None:
        self.calls = self.gradient = 0
        unet.register_forward_pre_hook(self)

    def __call__(self, *_) -> None:
        self.calls += 1
        self.gradient += torch.is_grad_enabled()


def batch(size: int, step: int) -> dict[str, list]:
    rows = range(step * size, (step + 1) * size)
    return {"prompts": [PROMPTS[row % len(PROMPTS)] for row in rows], "seeds": list(rows)}


def naive(a: argparse.Namespace, backbone) -> tuple:
    loop = NaiveLoop(
        backbone.tokenizer,
        backbone.text_encoder,
        backbone.vae,
        backbone.unet,
        backbone.noise_scheduler.config,
        Tower(a.size).to(a.device),
        a.steps,
        a.k,
        a.guidance,
    )

    def step(number: int) -> None:
        some = batch(a.batch, number)
        loop.step(some["prompts"], gaussian(some["seeds"], backbone.latent_shape).to(a.device))

    return step, lambda: None


def ours(a: argparse.Namespace, backbone) -> tuple:
    """A bare loop over the same module that Lightning trains."""
    module = make_module(a, backbone)
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.lower_frozen(a.precision)
    optimizer = module.configure_optimizers()
    dtype = {"bf16-mixed": torch.bfloat16}.get(a.precision)

    def step(number: int) -> None:
        with torch.autocast(a.device, dtype, enabled=dtype is not None):
            loss = module.training_step(batch(a.batch, number), number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: {} if module.prefix is None else module.prefix.record()


def make_module(a: argparse.Namespace, backbone) -> tc.TextCraftor:
    tower = Tower(a.size)
    reward = tc.rewards.FunctionReward(lambda images, prompts: tower(images), differentiable=True)
    tower.to(a.device).requires_grad_(False)
    backbone.tune("frozen" if a.unet_lora else "full", "lora" if a.unet_lora else "frozen", rank=4)
    speed_up(backbone.unet, backbone.vae, a.compile, a.channels_last)
    cache = PrefixCache(a.cache) if a.cache else None
    keep = int(a.keep) if a.keep.isdigit() else a.keep
    schedule = tc.LastK(a.k) if a.k < a.steps else tc.FullChain()
    options = {"steps": a.steps, "guidance_scale": a.guidance, "keep_activations": keep, "schedule": schedule}
    module = tc.TextCraftor(backbone, tc.RewardMix(tower=reward), prefix=cache, **options)
    return module.to(a.device)


def lightning(a: argparse.Namespace, backbone) -> tuple:
    """All steps by Trainer.fit, between the first batch's start and the last one's end."""
    module = make_module(a, backbone)
    data = PromptData([f"{PROMPTS[n % 4]} {n}" for n in range(a.batch * 64)], batch_size=a.batch)
    trainer = Trainer(
        accelerator="gpu" if a.device == "cuda" else "cpu",
        devices=1,
        precision=a.precision,
        max_steps=a.warmup + a.measured,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )
    return trainer, module, data


def run_lightning(a: argparse.Namespace, backbone) -> dict:
    from pytorch_lightning import Callback

    trainer, module, data = lightning(a, backbone)
    clock = Clock(a, backbone)

    class Around(Callback):
        def on_train_batch_start(self, trainer, module, some, number) -> None:
            if number == a.warmup:
                clock.start()

        def on_train_batch_end(self, trainer, module, *args) -> None:
            if trainer.global_step == a.warmup + a.measured:
                clock.stop()

    trainer.callbacks.append(Around())
    trainer.fit(module, data)
    return clock.result()


class Clock:
    """CPU seconds of this process, wall seconds, calls and peak memory between start and stop."""

    def __init__(self, a: argparse.Namespace, backbone) -> None:
        self.a, self.count = a, Count(backbone.unet)

    def now(self) -> tuple[float, float]:
        if self.a.device == "cuda":
            torch.cuda.synchronize()
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime, time.monotonic()

    def start(self) -> None:
        self.count.calls = self.count.gradient = 0
        self.began = self.now()

    def stop(self) -> None:
        self.ended = self.now()

    def result(self) -> dict:
        cpu, wall = (late - early for early, late in zip(self.began, self.ended, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.a.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        found = {"cpu": cpu / self.a.measured, "wall": wall / self.a.measured, "peak": peak}
        return {**found, "unet": self.count.calls / self.a.measured, "unet_gradient": self.count.gradient / self.a.measured}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("naive", "ours", "lightning"))
    for name, default in (("size", "tiny"), ("device", "cpu"), ("precision", "32-true"), ("keep", "all"), ("cache", "")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("steps", 25), ("k", 5), ("batch", 2), ("warmup", 1), ("measured", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=7.5)
    for name in ("compile", "channels_last", "unet_lora", "flops"):
        parser.add_argument(f"--{name}", action="store_true")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    backbone = make_backbone(a.size).to(a.device)
    if a.kind == "lightning":
        print(json.dumps(run_lightning(a, backbone)))
        return
    step, extra = (naive if a.kind == "naive" else ours)(a, backbone)
    clock = Clock(a, backbone)
    for number in range(a.warmup):
        step(number)
    clock.start()
    for number in range(a.warmup, a.warmup + a.measured):
        step(number)
    clock.stop()
    found = clock.result() | (extra() or {})
    if a.flops:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            step(a.warmup + a.measured)
        found["flops"] = counter.get_total_flops()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
