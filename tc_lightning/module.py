"""TextCraftor as a LightningModule (Li et al., CVPR 2024, Algorithm 1): prompts in, reward back-propagated, text encoder out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tc_lightning import method
from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning, constant, tuned_from
from tc_lightning.noise import gaussian
from tc_lightning.precision import AUTOCAST, lower_frozen
from tc_lightning.prefix import PrefixCache, fingerprint, prefix_length
from tc_lightning.regularizers import Penalty, Step, original_conditioning, penalties
from tc_lightning.rewards.base import Reward
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.schedules import LastK, at_step


class TextCraftor(method.Method):
    """Fine-tunes a backbone's text encoder (and UNet, where `backbone.tune` said so) against differentiable rewards.

    Args:
        backbone: the model; what learns is what `backbone.tune` set, by default the whole text encoder.
        reward: weighted rewards, maximised (Eq. 7).
        constraint: a further reward with its own weight (the CLIP constraint), or None.
        watch: scores that are never trained on (an oracle, rewards kept aside), measured beside the others.
        schedule: which steps carry gradient; the tuned text is seen from the first of them on.
        regularizers: penalties by name, see regularizers.py.
        optimizer: given the trainable parameters; the paper's AdamW by default.
        lr_scheduler: given the optimizer, stepped after every step of it; constant by default.
        steps, guidance_scale, timestep_spacing, keep_activations: of the chain.
        tuned_fraction: when sampling, the tuned text is used where t < 1000 * tuned_fraction (0.6 is the paper's).
        decode_batch: images decoded at once, and again in backward, which then keeps nothing of the decoder; all by default.
        prefix: keeps what the steps before the gradient give, or None to run them every time.
        tuned_from_start: in training the tuned text is seen at every step, the ones without gradient included, as DRaFT, ReFL and
            AlignProp train; False is TextCraftor's: from the first gradient step on.

    Raises:
        ValueError: a reward without gradient, nothing to learn, more gradient steps than steps, or a prefix cache where the steps
            before the gradient change while the run learns.
    """

    def __init__(
        self,
        backbone: Backbone,
        reward: RewardMix,
        constraint: Reward | None = None,
        watch: RewardMix | None = None,
        schedule: Callable[..., Tensor] | None = None,
        regularizers: Mapping[str, Penalty] | None = None,
        optimizer: method.Optimizer | None = None,
        lr_scheduler: method.Schedulers | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        timestep_spacing: str = "trailing",
        keep_activations: str | int = "none",
        tuned_fraction: float = 0.6,
        decode_batch: int | None = None,
        prefix: PrefixCache | None = None,
        tuned_from_start: bool = False,
    ) -> None:
        super().__init__()
        if set(backbone.modes.values()) == {"frozen"}:
            backbone.tune(text_encoder="full")
        self.backbone = backbone
        self.original = method.frozen_original(backbone)
        self.reward = reward
        self.constraint = method.constraint_mix(constraint, backbone)
        self.watch = watch
        self.schedule = schedule or LastK(5)
        self.chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale, timestep_spacing, keep_activations)
        self.tuned_fraction = tuned_fraction
        self.optimizer = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        self.first_gradient_step = self.schedule.first_gradient_step(steps)
        self.first_tuned_step = 0 if tuned_from_start else self.first_gradient_step
        tuned_from(self.chain.timesteps, tuned_fraction)  # refuse a fraction outside [0, 1] now, not after the first epoch
        for mix in (self.reward, self.constraint):
            if mix is not None:
                mix.require_differentiable()
        if decode_batch is not None and decode_batch < 1:
            raise ValueError(f"chain.decode_batch={decode_batch}: accepted is 1 or more images, or null")
        self.decode_batch = decode_batch
        self._restore: Callable[[], None] | None = None
        self.prefix = prefix
        if prefix is not None:
            prefix_length(self.first_gradient_step, self.first_tuned_step, backbone.modes["unet"])
        method.check_something_learns(self)
        self.regularizers = penalties(regularizers, self)
        self.strict_loading = False
        self.on_nonfinite: Callable[[FloatingPointError], None] | None = None  # set by a Guard

    def cost(self) -> tuple[float, float]:
        """Forwards and backwards of the UNet for a sample, as the schedule has them (penalties not counted)."""
        steps = len(self.chain)
        return self.schedule.cost(steps) if hasattr(self.schedule, "cost") else (steps, steps - self.first_gradient_step)

    def training_step(self, batch: dict[str, list], batch_index: int) -> Tensor:
        """One step of Algorithm 1 on a batch {"prompts": [B], "seeds": [B]}; returns the loss."""
        prompts = batch["prompts"]
        schedule = at_step(self.schedule, self.global_step, batch["seeds"])
        x, start = self.enter(prompts, batch["seeds"])
        conditioning = self.condition(prompts, start=start)
        self.chain.settle(x, conditioning)
        latents = schedule(self.chain, x, conditioning, start)
        images = self.decode(latents)
        # LowVariance gives several images a prompt
        repeated = prompts * (len(images) // len(prompts))
        return self.objective(images, repeated, latents[: len(prompts)], conditioning, batch["seeds"])

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, h, w]."""
        if self.decode_batch is None:
            return self.backbone.decode(latents)
        return torch.cat([checkpoint(self.backbone.decode, x, use_reentrant=False) for x in latents.split(self.decode_batch)])

    def enter(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, int]:
        """Latents [B, C, h, w] and the step they enter: noise and 0, or what the prefix cache keeps and the first gradient step."""
        if self.prefix is None:
            return gaussian(seeds, self.backbone.latent_shape).to(self.device), 0
        self.open_prefix()
        latents = self.prefix.latents(prompts, seeds, self.run_prefix).to(self.device)
        self.log("perf/prefix_hits", self.prefix.hit_rate, batch_size=len(prompts))
        return latents, self.first_gradient_step

    def open_prefix(self) -> None:
        """Find this run's records, on the device and in the precision that it runs in; once."""
        if self.prefix.store is None:
            fields = fingerprint(self.backbone, self.original, self.chain, self.first_gradient_step)
            self.prefix.open(fields, self.backbone.latent_shape)

    @torch.no_grad()
    def run_prefix(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Latents [B, C, h, w] after the steps before the gradient, on the original text."""
        x = gaussian(seeds, self.backbone.latent_shape).to(self.device)
        return self.chain.run(x, constant(method.pair(self.backbone, prompts, self.original)), 0, self.first_gradient_step)

    def condition(self, prompts: Sequence[str], first_tuned_step: int | None = None, start: int = 0) -> Conditioning:
        """The original text before `first_tuned_step` and the tuned text from it on; null embeddings likewise.

        Of a chain that begins at `start` the text that it does not meet is not computed.
        """
        first = self.first_tuned_step if first_tuned_step is None else first_tuned_step
        return method.condition(self, prompts, first, start)

    def objective(
        self, images: Tensor, prompts: Sequence[str], latents: Tensor, conditioning: Conditioning, seeds: Sequence[int]
    ) -> Tensor:
        """Loss = -sum_i w_i R_i - w_c C + sum_j w_j penalty_j, averaged over the batch (Eq. 7); every term is logged by name."""
        total, held, terms = method.climbed(self, images, prompts)
        loss = -(total + held).mean()
        if self.regularizers:
            original = original_conditioning(self, prompts[: len(latents)])
            step = Step(latents, conditioning, original, terms, seeds, self.global_step, self.first_gradient_step)
            for name, penalty in self.regularizers.items():
                value = penalty(step)
                loss = loss + penalty.weight * value
                self.log(f"regularizer/{name}", value.detach(), batch_size=len(prompts), sync_dist=True)
        method.log_terms(self, loss, total, terms)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        method.log_optimizer(self, optimizer)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], tuned: bool = True) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] as at test time, or the original model's with `tuned=False` (text only)."""
        # callbacks sample outside Lightning's steps, and so outside its autocast
        with self.trainer.precision_plugin.forward_context() if self._restore is not None else nullcontext():
            return super().sample(prompts, seeds, tuned)

    def lower_frozen(self, precision: str) -> None:
        """Hold frozen networks in the dtype of a mixed precision, by Lightning's name; nothing for another precision."""
        if precision in AUTOCAST:
            self._restore = lower_frozen((self.backbone.unet, self.backbone.vae), AUTOCAST[precision])

    def on_fit_start(self) -> None:
        """Frozen networks in the run's precision."""
        self.lower_frozen(self.trainer.precision)

    def on_fit_end(self) -> None:
        """Frozen networks as they were."""
        if self._restore is not None:
            self._restore()
            self._restore = None
