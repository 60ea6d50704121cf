"""TextCraftor as a LightningModule (Li et al., CVPR 2024, Algorithm 1): prompts in, reward back-propagated, text encoder out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.conditioning import Conditioning, constant, guidance_pair, switch, tuned_from
from tc_lightning.noise import gaussian
from tc_lightning.prefix import PrefixCache, fingerprint, prefix_length
from tc_lightning.rewards.base import BoundReward, Reward
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.shared import shared_features
from tc_lightning.sampling import sample
from tc_lightning.schedules import LastK, at_step
from tc_lightning.trainable import check_names, keep_trainable, trainable_names

Optimizer = Callable[..., torch.optim.Optimizer]


class TextCraftor(LightningModule):
    """Fine-tunes a backbone's text encoder (and UNet, where `backbone.tune` said so) against differentiable rewards.

    Args:
        backbone: the model; what learns is what `backbone.tune` set, by default the whole text encoder.
        reward: weighted rewards, maximised (Eq. 7).
        constraint: a further reward with its own weight (the CLIP constraint), or None.
        watch: scores that are never trained on (an oracle, rewards kept aside), measured beside the others.
        schedule: which steps carry gradient; the tuned text is seen from the first of them on.
        optimizer: given the trainable parameters; the paper's AdamW by default.
        lr_scheduler: given the optimizer, stepped after every step of it; constant by default.
        steps, guidance_scale, timestep_spacing, keep_activations: of the chain.
        tuned_fraction: when sampling, the tuned text is used where t < 1000 * tuned_fraction (0.6 is the paper's).
        prefix: keeps what the steps before the gradient give, or None to run them every time.

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
        optimizer: Optimizer | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        timestep_spacing: str = "trailing",
        keep_activations: str | int = "none",
        tuned_fraction: float = 0.6,
        prefix: PrefixCache | None = None,
    ) -> None:
        super().__init__()
        if set(backbone.modes.values()) == {"frozen"}:
            backbone.tune(text_encoder="full")
        self.backbone = backbone
        self.original = _original(backbone)
        self.reward = reward
        self.constraint = RewardMix(constraint=constraint) if constraint is not None else None
        if isinstance(constraint, BoundReward):
            constraint.bind(backbone.text_encoder, backbone.tokenizer)
        self.watch = watch
        self.schedule = schedule or LastK(5)
        self.chain = Chain(backbone.unet, backbone.noise_scheduler, steps, guidance_scale, timestep_spacing, keep_activations)
        self.tuned_fraction = tuned_fraction
        self.optimizer = optimizer or torch.optim.AdamW
        self.lr_scheduler = lr_scheduler
        self.first_gradient_step = self.schedule.first_gradient_step(steps)
        tuned_from(self.chain.timesteps, tuned_fraction)  # refuse a fraction outside [0, 1] now, not after the first epoch
        for mix in (self.reward, self.constraint):
            if mix is not None:
                mix.require_differentiable()
        self.prefix = prefix
        if prefix is not None:
            prefix_length(self.first_gradient_step, self.first_gradient_step, backbone.modes["unet"])
        if not trainable_names(self):
            raise ValueError("nothing learns: tune.text_encoder and tune.unet are both frozen")
        self.strict_loading = False
        self.on_nonfinite: Callable[[FloatingPointError], None] | None = None  # set by a Guard

    def training_step(self, batch: dict[str, list], batch_index: int) -> Tensor:
        """One step of Algorithm 1 on a batch {"prompts": [B], "seeds": [B]}; returns the loss."""
        prompts = batch["prompts"]
        schedule = at_step(self.schedule, self.global_step, batch["seeds"])
        x, start = self.enter(prompts, batch["seeds"])
        latents = schedule(self.chain, x, self.condition(prompts, start=start), start)
        images = self.backbone.decode(latents)
        return self.objective(images, prompts * (len(images) // len(prompts)))  # LowVariance gives several images a prompt

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
        return self.chain.run(x, constant(self._pair(prompts, self.original)), 0, self.first_gradient_step)

    def condition(self, prompts: Sequence[str], first_tuned_step: int | None = None, start: int = 0) -> Conditioning:
        """The original text before `first_tuned_step` and the tuned text from it on; null embeddings likewise.

        Of a chain that begins at `start` the text that it does not meet is not computed.
        """
        first = self.first_gradient_step if first_tuned_step is None else first_tuned_step
        tuned = self._pair(prompts, self.backbone.text_encoder)
        if self.original is None or first <= start:
            return constant(tuned)
        with torch.no_grad():
            original = self._pair(prompts, self.original)
        return switch(original, tuned, first)

    def _pair(self, prompts: Sequence[str], text_encoder: nn.Module) -> Tensor:
        embeds = self.backbone.encode(["", *prompts], text_encoder)
        return guidance_pair(embeds[:1], embeds[1:])

    def objective(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Loss = -sum_i w_i R_i - w_c C, averaged over the batch (Eq. 7); every term is logged by name."""
        try:
            with shared_features():  # a constraint that stands on a reward's CLIP does not run it again
                total, scores = self.reward(images, prompts)
                held, terms = self.constraint(images, prompts) if self.constraint is not None else (0.0 * total, {})
        except FloatingPointError as error:
            if self.on_nonfinite is None:
                raise
            self.on_nonfinite(error)
            # not-a-number in every process' gradient, and the same names to log: all of them skip this step together
            total = held = images.flatten(1).sum(1) * float("nan")
            mixes = [mix for mix in (self.reward, self.constraint) if mix is not None]
            scores, terms = {name: total for mix in mixes for name in mix.rewards}, {}
        loss = -(total + held).mean()
        logged = {f"train/{name}": value.detach().mean() for name, value in (scores | terms).items()}
        options = {"batch_size": len(prompts), "sync_dist": True}  # the mean over all processes
        self.log_dict(logged, **options)
        self.log("train/loss", loss.detach(), **options)
        self.log("train/reward", total.detach().mean(), prog_bar=True, **options)
        return loss

    def on_train_start(self) -> None:
        """Log the weights of the terms, once."""
        mixes = [mix for mix in (self.reward, self.constraint) if mix is not None]
        weights = {f"weight/{name}": reward.weight for mix in mixes for name, reward in mix.rewards.items()}
        for logger in self.loggers if self.trainer.is_global_zero else ():
            logger.log_metrics(weights, self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm before clipping, and the learning rate."""
        self.log("train/lr", float(optimizer.param_groups[0]["lr"]))
        norms = [parameter.grad.norm() for parameter in self.parameters() if parameter.grad is not None]
        if norms:  # none in a step that a Guard skips
            self.log("train/grad_norm", torch.stack(norms).norm())

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every score [B] by name: `total` (the rewards' weighted sum), each reward, the constraint, what is watched."""
        with shared_features():
            total, scores = self.reward(images, prompts)
            named = {"total": total, **scores}
            for mix in (self.constraint, self.watch):
                named |= mix(images, prompts)[1] if mix is not None else {}
        return named

    @torch.no_grad()
    def validation_step(self, batch: dict[str, list], batch_index: int) -> None:
        """Score dev prompts sampled as at test time; logs val/total and val/<name>, and watch/<name> for what is watched."""
        prompts = batch["prompts"]
        watched = self.watch.rewards if self.watch is not None else {}
        for name, value in self.score(self.sample(prompts, batch["seeds"]), prompts).items():
            key = f"watch/{name}" if name in watched else f"val/{name}"
            self.log(key, value.mean(), prog_bar=name == "total", batch_size=len(prompts), sync_dist=True)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], seeds: Sequence[int], tuned: bool = True) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] as at test time, or the original model's with `tuned=False` (text only)."""
        first = tuned_from(self.chain.timesteps, self.tuned_fraction) if tuned else len(self.chain)
        return sample(self.backbone, self.chain, self.condition(prompts, first), seeds)

    def configure_optimizers(self) -> Any:
        """The optimizer over exactly the parameters that learn, with its learning rate's schedule if there is one."""
        optimizer = self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def train(self, mode: bool = True) -> TextCraftor:
        """Keep every network in eval mode: dropout has no place in a reward's gradient."""
        super().train(False)
        self.training = mode
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Frozen networks are not in a checkpoint."""
        checkpoint["state_dict"] = keep_trainable(checkpoint["state_dict"], self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose names or shapes are not exactly the trainable ones."""
        check_names(checkpoint["state_dict"], self)


def _original(backbone: Backbone) -> nn.Module | None:
    """A frozen copy of the text encoder, unless the text encoder does not learn."""
    return None if backbone.modes["text_encoder"] == "frozen" else backbone.frozen_text_encoder()
