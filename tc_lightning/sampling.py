"""Prompts to images, one noise seed an image: an image depends on its prompt and seed, not on the batch it is made in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tc_lightning import ddim
from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning, constant, guidance_pair, switch, tuned_from
from tc_lightning.noise import derive_seed, gaussian

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}


@torch.no_grad()
def sample(backbone: Backbone, chain: Chain, conditioning: Conditioning, seeds: Sequence[int]) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] of a conditioning for B rows, one seed a row."""
    x = gaussian(seeds, backbone.latent_shape).to(backbone.device)
    return backbone.decode(chain.run(x, conditioning))


@dataclass(frozen=True, eq=False)
class Sampler:
    """A model as it is tested: (prompts [B], seeds [B]) -> images [B, 3, H, W] in [0, 1] on the CPU.

    Args:
        backbone: the model; its text encoder is the tuned one.
        steps, guidance_scale, timestep_spacing: of the chain.
        tuned_fraction: the tuned text is used where t < 1000 * tuned_fraction, the original before (0.6 in the paper).
        original: the text encoder before tuning; needed for a tuned_fraction below 1.
        scheduler: one of SCHEDULERS; ddim is our own chain, the others are diffusers' with the model's noise levels.
        on_step: told the index of each step before it runs (a progress bar).
        rewriter: list of prompts -> list of prompts, applied before the text encoder (rewriting.py).

    Raises:
        ValueError: an unknown scheduler, a tuned_fraction outside [0, 1], or below 1 without `original`.
    """

    backbone: Backbone
    steps: int = 25
    guidance_scale: float = 7.5
    timestep_spacing: str = "trailing"
    tuned_fraction: float = 1.0
    original: nn.Module | None = None
    scheduler: str = "ddim"
    on_step: Callable[[int], None] | None = None
    rewriter: Callable[[Sequence[str]], list[str]] | None = None

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler={self.scheduler!r}, accepted: {', '.join(SCHEDULERS)}")
        tuned_from([], self.tuned_fraction)
        if self.tuned_fraction < 1 and self.original is None:
            raise ValueError(f"tuned_fraction={self.tuned_fraction} needs the original text encoder: original=...")

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """One image a prompt and seed."""
        prompts = self.rewriter(prompts) if self.rewriter is not None else prompts
        if self.scheduler == "ddim":
            chain = self.chain()
            first = tuned_from(chain.timesteps, self.tuned_fraction, chain.num_train_timesteps)
            return sample(self.backbone, chain, self._told(self.condition(prompts, first)), seeds).cpu()
        scheduler = noise_scheduler(self.scheduler, self.backbone.noise_scheduler, self.timestep_spacing)
        scheduler.set_timesteps(self.steps)
        first = tuned_from(scheduler.timesteps.tolist(), self.tuned_fraction, scheduler.config.num_train_timesteps)
        latents = denoise(self.backbone, scheduler, self._told(self.condition(prompts, first)), seeds, self.guidance_scale)
        return self.backbone.decode(latents).cpu()

    def _told(self, conditioning: Conditioning) -> Conditioning:
        """The same conditioning; `on_step` hears of each step that asks it."""
        if self.on_step is None:
            return conditioning

        def told(step: int) -> dict[str, Any]:
            self.on_step(step)
            return conditioning(step)

        return told

    def chain(self) -> Chain:
        """The DDIM chain with these settings."""
        return Chain(self.backbone.unet, self.backbone.noise_scheduler, self.steps, self.guidance_scale, self.timestep_spacing)

    def condition(self, prompts: Sequence[str], first_tuned_step: int) -> Conditioning:
        """The original text before a step, the tuned text from it on; null embeddings likewise, as in training."""
        tuned = constant(_pair(self.backbone, prompts, self.backbone.text_encoder))
        if first_tuned_step == 0 or self.original is None:
            return tuned
        return switch(_pair(self.backbone, prompts, self.original), tuned, first_tuned_step)


def noise_scheduler(name: str, base: Any, timestep_spacing: str) -> Any:
    """A diffusers scheduler of the same noise levels and prediction type as `base`."""
    import diffusers

    # PNDM's Runge-Kutta warm-up has no place in Stable Diffusion: every published pipeline skips it
    options = {"skip_prk_steps": True} if name == "pndm" else {}
    return getattr(diffusers, SCHEDULERS[name]).from_config(base.config, timestep_spacing=timestep_spacing, **options)


@torch.no_grad()
def denoise(backbone: Backbone, scheduler: Any, conditioning: Conditioning, seeds: Sequence[int], guidance_scale: float) -> Tensor:
    """Latents [B, C, h, w] after all timesteps of a diffusers scheduler; noise that it adds comes from each row's seed.

    `conditioning` is asked by the index into the scheduler's timesteps (PNDM has one more than its steps).
    """
    x = gaussian(seeds, backbone.latent_shape).to(backbone.device) * scheduler.init_noise_sigma
    generators = [torch.Generator().manual_seed(derive_seed(seed, 1)) for seed in seeds]
    options = {"generator": generators} if "Ancestral" in type(scheduler).__name__ else {}
    for index, t in enumerate(scheduler.timesteps.to(backbone.device)):
        embeds = conditioning(index)["encoder_hidden_states"]
        guided = guidance_scale != 1.0
        inputs = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
        output = backbone.unet(inputs, t, encoder_hidden_states=embeds if guided else embeds[len(x) :]).sample.to(x.dtype)
        noise_pred = ddim.guide(*output.chunk(2), guidance_scale) if guided else output
        x = scheduler.step(noise_pred, t, x, **options).prev_sample
    return x


def generate(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance_scale: float = 7.5,
    timestep_spacing: str = "trailing",
    tuned_fraction: float = 1.0,
    original: nn.Module | None = None,
    batch_size: int = 8,
    scheduler: str = "ddim",
    rewriter: Callable[[Sequence[str]], list[str]] | None = None,
) -> Tensor:
    """Images [P * S, 3, H, W] in [0, 1] on the CPU, every prompt with every seed, prompts outermost.

    Args:
        backbone: the model; its text encoder is the tuned one.
        prompts: P texts.
        seeds: S noise seeds.
        tuned_fraction: the tuned text is used where t < 1000 * tuned_fraction, the original before.
        original: the text encoder before tuning; needed for a tuned_fraction below 1.
        scheduler: one of SCHEDULERS.
        rewriter: applied to the prompts before the text encoder.

    Raises:
        ValueError: no prompt or no seed; a tuned_fraction below 1 without `original`.
    """
    if isinstance(prompts, str) or not prompts or not seeds:
        raise ValueError("generate needs a list of prompts and a list of seeds, at least one of each")
    sampler = Sampler(backbone, steps, guidance_scale, timestep_spacing, tuned_fraction, original, scheduler, rewriter)
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = [sampler(*zip(*rows[start : start + batch_size], strict=True)) for start in range(0, len(rows), batch_size)]
    return torch.cat(images)


def _pair(backbone: Backbone, prompts: Sequence[str], text_encoder: nn.Module) -> Tensor:
    return guidance_pair(backbone.encode([""], text_encoder), backbone.encode(prompts, text_encoder))
