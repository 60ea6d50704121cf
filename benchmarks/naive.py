"""The published training loop as docs/performance.md describes it, written on its own, to measure against.

fp32; diffusers' scheduler; the first T - K steps without gradient on the frozen text encoder; the last K checkpointed; every
network keeps requires_grad, so gradients of frozen weights are computed and thrown away; the null prompt is encoded with each
prompt; nothing is kept from step to step.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class NaiveLoop:
    """One training step of the text stage a call.

    Args:
        tokenizer, text_encoder, vae, unet, scheduler_config: of a Stable Diffusion model; the text encoder learns.
        reward: images [B, 3, H, W] in [0, 1] -> [B].
    """

    def __init__(self, tokenizer, text_encoder, vae, unet, scheduler_config, reward: nn.Module, steps=25, k=5, guidance=7.5):
        import copy

        self.tokenizer, self.tuned, self.vae, self.unet, self.reward = tokenizer, text_encoder, vae, unet, reward
        self.original = copy.deepcopy(text_encoder)
        for network in (self.tuned, self.original, vae, unet, reward):
            network.requires_grad_(True)
        self.scheduler = DDIMScheduler.from_config(scheduler_config, timestep_spacing="trailing", clip_sample=False)
        self.scheduler.set_timesteps(steps)
        self.steps, self.k, self.guidance = steps, k, guidance
        self.optimizer = torch.optim.AdamW(self.tuned.parameters(), lr=1e-6)

    def embed(self, encoder: nn.Module, prompts: list[str]) -> Tensor:
        """[2B, L, D], the empty prompts first."""
        texts = [""] * len(prompts) + list(prompts)
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return encoder(ids.to(self.unet.device)).last_hidden_state

    def denoise(self, x: Tensor, t: Tensor, embeds: Tensor) -> Tensor:
        """One guided step."""
        empty, told = self.unet(torch.cat([x, x]), t, embeds).sample.chunk(2)
        return self.scheduler.step(empty + self.guidance * (told - empty), t, x).prev_sample

    def loss(self, prompts: list[str], x: Tensor) -> Tensor:
        """Minus the mean reward of the pictures that noise x [B, C, h, w] becomes."""
        timesteps = self.scheduler.timesteps.to(x.device)
        with torch.no_grad():
            embeds = self.embed(self.original, prompts)
            for t in timesteps[: self.steps - self.k]:
                x = self.denoise(x, t, embeds)
        embeds = self.embed(self.tuned, prompts)
        for t in timesteps[self.steps - self.k :]:
            x = checkpoint(self.denoise, x, t, embeds, use_reentrant=False)
        pictures = (checkpoint(self.decode, x, use_reentrant=False) / 2 + 0.5).clamp(0, 1)
        return -self.reward(pictures).mean()

    def decode(self, x: Tensor) -> Tensor:
        """Pixels in [-1, 1], roughly."""
        return self.vae.decode(x / self.vae.config.scaling_factor).sample

    def step(self, prompts: list[str], x: Tensor) -> None:
        """Loss, gradients of everything, an update of the text encoder."""
        self.loss(prompts, x).backward()
        self.optimizer.step()
        for network in (self.tuned, self.vae, self.unet, self.reward):
            network.zero_grad()
