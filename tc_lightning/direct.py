"""Direct fine-tuning: rewards of one-call predictions from noised real images (TextCraftor section 3.2.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tc_lightning import ddim, method
from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import tuned_from
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.mix import RewardMix


class Direct(method.Method):
    """Fine-tunes on image-caption pairs: noise an image to a random t, predict x_0 in one guided UNet call, decode, score.

    The paper's comparison, which helps less than sampling from prompts: the reward sees pictures of real images, not the
    model's own. Loss, rewards, constraint, sampling and checkpoints are TextCraftor's.

    Args:
        backbone, reward, constraint, watch, optimizer, lr_scheduler: as in TextCraftor.
        steps, guidance_scale, timestep_spacing: of the chain that validation samples with; guidance is used in training too.
        tuned_fraction: when sampling, the tuned text is used where t < 1000 * tuned_fraction.

    Raises:
        ValueError: a reward without gradient, or nothing to learn; in training, a batch without images.
    """

    needs_images = True

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
    ) -> None:
        super().__init__()
        if set(backbone.modes.values()) == {"frozen"}:
            backbone.tune(text_encoder="full")
        self.backbone = backbone
        self.original = method.frozen_original(backbone)
        self.reward = reward
        self.constraint = method.constraint_mix(constraint, backbone)
        self.watch = watch
        self.chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale, timestep_spacing)
        self.tuned_fraction = tuned_fraction
        self.optimizer = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        tuned_from(self.chain.timesteps, tuned_fraction)
        for mix in (self.reward, self.constraint):
            if mix is not None:
                mix.require_differentiable()
        method.check_something_learns(self)
        self.first_gradient_step = len(self.chain) - 1  # one call at a time is kept for backward
        self.strict_loading = False
        self.on_nonfinite: Callable[[FloatingPointError], None] | None = None  # set by a Guard

    def cost(self) -> tuple[float, float]:
        """Forwards and backwards of the UNet for a sample."""
        return 1, 1

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """The loss of a batch {"prompts": [B], "seeds": [B], "images": [B, 3, H, W] in [0, 1]}."""
        if "images" not in batch:
            raise ValueError("method=direct learns from images with captions: PromptData(..., images=...)")
        prompts = batch["prompts"]
        images = self.backbone.decode(self.predict_x0(batch["images"].to(self.device), prompts, batch["seeds"]))
        total, held, terms = method.climbed(self, images, prompts)
        loss = -(total + held).mean()
        method.log_terms(self, loss, total, terms)
        return loss

    def predict_x0(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """x_0 [B, C, h, w] as predicted in one call from each image's latents at a t of its own (Eqs. 3 and 4).

        t is uniform over the training timesteps; it and the noise are functions of the row's seed.
        """
        scheduler = self.backbone.noise_scheduler
        with torch.no_grad():
            x0 = self.backbone.encode_images(images)
        t = torch.tensor([derive_seed(seed, 31) % self.chain.num_train_timesteps for seed in seeds])
        alpha_bar = scheduler.alphas_cumprod[t].to(x0)
        x = ddim.add_noise(x0, gaussian(seeds, x0.shape[1:]).to(x0), alpha_bar)
        kwargs = method.condition(self, prompts, 0)(0)
        noise_pred = self.chain.noise_pred_at(x, t.to(x.device), kwargs)
        return ddim.predict_x0(x, noise_pred, alpha_bar, self.chain.prediction_type)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        method.log_optimizer(self, optimizer)
