"""DDPO: policy gradient over the stochastic chain (Black et al., Training Diffusion Models with RL, ICLR 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.strategies import ParallelStrategy
from torch import Tensor

from tc_lightning import ddim, method
from tc_lightning.advantages import PromptStatistics
from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import constant, tuned_from
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.regularizers import on_unet
from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.mix import RewardMix


@dataclass
class Rollout:
    """Images as they were made: prompts (N), latents [T + 1, N, C, h, w] from x_T to x_0, log-densities of steps [T, N]."""

    prompts: list[str]
    latents: Tensor
    log_probs: Tensor


class DDPO(method.Method):
    """Fine-tunes by policy gradient: a step of the chain is an action, its density is known where eta > 0.

    Rewards need no gradient. Each batch of prompts is sampled with `samples_per_prompt` images a prompt; the rewards become
    advantages over the prompt's usual reward; each step's log-density is pushed by them, with PPO's clipped ratio. A
    log-density is the mean over the latents' dimensions, as published, hence the small clip range. Steps that learn: those
    that see the tuned text (t < 1000 * tuned_fraction), all where the UNet learns; a step without noise (the last, where
    alpha_bar becomes 1) has no density and is left out.

    Args:
        backbone, reward, constraint, watch, optimizer, lr_scheduler: as in TextCraftor; any reward will do.
        steps, guidance_scale, timestep_spacing: of the chain.
        tuned_fraction: the tuned text is used where t < 1000 * tuned_fraction, in training as at test time.
        eta: noise of the chain in training, above 0; 1 is DDPM's.
        samples_per_prompt: images a prompt and batch.
        epochs: optimizer steps on each batch of images; the ratio is 1 in the first.
        clip_range: the ratio is clipped to 1 -+ this.
        advantage_clip: advantages are cut to -+ this.
        kept_rewards: of each prompt, for its statistics.
        kl_weight: of the divergence from the original model's steps (DPOK, Fan et al., NeurIPS 2023); 0 leaves it out.
        gradient_clip_val: norm that the gradient is clipped to; Lightning clips by itself only where it steps by itself.

    Raises:
        ValueError: eta 0, numbers out of range, or nothing to learn.
    """

    def __init__(
        self,
        backbone: Backbone,
        reward: RewardMix,
        constraint: Reward | None = None,
        watch: RewardMix | None = None,
        optimizer: method.Optimizer | None = None,
        lr_scheduler: method.Schedulers | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        timestep_spacing: str = "trailing",
        tuned_fraction: float = 0.6,
        eta: float = 1.0,
        samples_per_prompt: int = 4,
        epochs: int = 1,
        clip_range: float = 1e-4,
        advantage_clip: float = 5.0,
        kept_rewards: int = 16,
        kl_weight: float = 0.0,
        gradient_clip_val: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < eta <= 1:
            raise ValueError(f"method.eta={eta}: a step without noise has no density; accepted: above 0, at most 1 (DDPM)")
        if samples_per_prompt < 1 or epochs < 1 or not clip_range > 0 or not kl_weight >= 0:
            numbers = f"samples_per_prompt={samples_per_prompt}, epochs={epochs}, clip_range={clip_range}, kl_weight={kl_weight}"
            raise ValueError(f"DDPO({numbers}): accepted: at least 1, at least 1, above 0, at least 0")
        if set(backbone.modes.values()) == {"frozen"}:
            backbone.tune(text_encoder="full")
        self.automatic_optimization = False
        self.backbone = backbone
        self.original = method.frozen_original(backbone)
        self.reward = reward
        self.constraint = method.constraint_mix(constraint, backbone)
        self.watch = watch
        self.chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale, timestep_spacing)
        self.tuned_fraction, self.eta = tuned_fraction, eta
        self.samples_per_prompt, self.epochs = samples_per_prompt, epochs
        self.clip_range, self.kl_weight, self.gradient_clip_val = clip_range, kl_weight, gradient_clip_val
        self.optimizer = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        self.statistics = PromptStatistics(kept_rewards, clip=advantage_clip)
        self.original_unet = backbone.original_unet() if kl_weight else None
        self.first_tuned_step = tuned_from(self.chain.timesteps, tuned_fraction)
        method.check_something_learns(self)
        if not self.learning_steps:
            raise ValueError(f"no step learns: tuned_fraction={tuned_fraction}, chain.steps={steps}; accepted: more of one of them")
        self.first_gradient_step = len(self.chain) - 1  # one call at a time is kept for backward
        self.strict_loading = False
        self.on_nonfinite: Callable[[FloatingPointError], None] | None = None  # set by a Guard

    @property
    def learning_steps(self) -> list[int]:
        """Indices of the steps whose density is pushed."""
        first = 0 if self.backbone.modes["unet"] != "frozen" else self.first_tuned_step
        return [i for i in range(first, len(self.chain)) if self.chain.alpha_bar(i)[1] < 1]

    @property
    def images_per_prompt(self) -> float:
        """Images made for each prompt and optimizer step."""
        return self.samples_per_prompt / self.epochs

    def cost(self) -> tuple[float, float]:
        """Forwards and backwards of the UNet for an image and optimizer step: the chain, then each learning step again."""
        learning = len(self.learning_steps)
        return len(self.chain) / self.epochs + learning * (2 if self.kl_weight else 1), learning

    def training_step(self, batch: dict[str, list], batch_index: int) -> None:
        """Sample, score, and step the optimizer `epochs` times on a batch {"prompts": [B], "seeds": [B]}."""
        prompts = [prompt for prompt in batch["prompts"] for _ in range(self.samples_per_prompt)]
        seeds = [derive_seed(seed, 41, number) for seed in batch["seeds"] for number in range(self.samples_per_prompt)]
        with torch.no_grad():
            rollout = self.roll_out(prompts, seeds)
            images = self.backbone.decode(rollout.latents[-1])
            total, held, terms = method.climbed(self, images, prompts)
        advantages = self.advantages(prompts, total + held)
        for _ in range(self.epochs):
            loss = self.update(rollout, advantages)
        method.log_terms(self, loss, total, terms)

    @torch.no_grad()
    def roll_out(self, prompts: list[str], seeds: Sequence[int]) -> Rollout:
        """Images of prompts (N): the chain with noise, and the log-density of each step that learns (0 for the others)."""
        conditioning = method.condition(self, prompts, self.first_tuned_step)
        shape, chain = self.backbone.latent_shape, self.chain
        x = gaussian(seeds, shape).to(self.device)
        latents, log_probs = [x], []
        for i in range(len(chain)):
            mean, std = self.distribution(x, chain.noise_pred(x, i, conditioning), i)
            x = mean + std * gaussian(seeds, shape, salt=i + 1).to(mean)
            latents.append(x)
            log_probs.append(self.log_prob(x, mean, std) if i in self.learning_steps else torch.zeros(len(x)).to(mean))
        return Rollout(prompts, torch.stack(latents), torch.stack(log_probs))

    def distribution(self, x: Tensor, noise_pred: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean [N, C, h, w] and standard deviation of p(x_{t-1} | x_t) at step i."""
        return ddim.step_distribution(x, noise_pred, *self.chain.alpha_bar(i), self.chain.prediction_type, self.eta)

    @staticmethod
    def log_prob(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-density [N] of a step, the mean over the latents' dimensions."""
        return ddim.log_prob(x_prev, mean, std) / x_prev[0].numel()

    def advantages(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """Advantages [N]; statistics are taken over the images of all processes."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.statistics(prompts, rewards)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (prompts, rewards.tolist()))
        texts = [text for some, _ in everyone for text in some]
        values = torch.tensor([value for _, some in everyone for value in some], dtype=rewards.dtype)
        begin = torch.distributed.get_rank() * len(prompts)
        return self.statistics(texts, values)[begin : begin + len(prompts)].to(rewards)

    def update(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """One step of the optimizer: every learning step's gradient, one after the other; returns the loss."""
        optimizer, steps = self.optimizers(), self.learning_steps
        optimizer.zero_grad()
        told = {"loss": 0.0, "ratio": 0.0, "clipped": 0.0, "kl": 0.0}
        for i in steps:
            with self.unsynchronised() if i != steps[-1] else contextlib.nullcontext():
                terms = self.step_loss(rollout, advantages, i)
                self.manual_backward(terms["loss"] / len(steps))
            told = {name: value + terms[name].detach() / len(steps) for name, value in told.items()}
        method.log_optimizer(self, optimizer)  # before clipping
        self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")
        optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_schedulers().step()
        loss = told.pop("loss")
        self.log_dict({f"ddpo/{name}": value for name, value in told.items()}, batch_size=len(advantages), sync_dist=True)
        return loss

    def unsynchronised(self) -> contextlib.AbstractContextManager:
        """Gradients of this backward stay in their process; the last backward of an update adds up all of them."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else contextlib.nullcontext()

    def step_loss(self, rollout: Rollout, advantages: Tensor, i: int) -> dict[str, Tensor]:
        """PPO's clipped loss of step i, with the divergence where it has a weight; scalars loss, ratio, clipped, kl."""
        x, x_prev = rollout.latents[i], rollout.latents[i + 1]
        tuned = i >= self.first_tuned_step
        encoder = self.backbone.text_encoder if tuned or self.original is None else self.original
        conditioning = constant(method.pair(self.backbone, rollout.prompts, encoder))
        mean, std = self.distribution(x, self.chain.noise_pred(x, i, conditioning), i)
        ratio = (self.log_prob(x_prev, mean, std) - rollout.log_probs[i]).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()
        kl = self.divergence(x, mean, std, rollout.prompts, i) if self.kl_weight else torch.zeros_like(loss)
        outside = ((ratio - 1).abs() > self.clip_range).float().mean()
        return {"loss": loss + self.kl_weight * kl, "ratio": ratio.mean(), "clipped": outside, "kl": kl}

    def divergence(self, x: Tensor, mean: Tensor, std: Tensor, prompts: list[str], i: int) -> Tensor:
        """KL of step i from the original model's step, |mean - mean_0|^2 / (2 std^2), the mean over images and dimensions."""
        with torch.no_grad():
            original = constant(method.pair(self.backbone, prompts, self.original or self.backbone.text_encoder))
            noise_pred = on_unet(self.chain, self.original_unet.to(x.device)).noise_pred(x, i, original)
            usual, _ = self.distribution(x, noise_pred, i)
        return (0.5 * ((mean - usual) / std) ** 2).mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen networks are not in a checkpoint, the prompts' statistics are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["prompt_statistics"] = self.statistics.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose names or shapes are not exactly the trainable ones."""
        super().on_load_checkpoint(checkpoint)
        self.statistics.load_state_dict(checkpoint.get("prompt_statistics", {}))
