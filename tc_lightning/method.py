"""What every training method does alike: the text it conditions on, scores, sampling, validation, optimizer, checkpoint.

Functions of a method, that is a LightningModule with these attributes: `backbone`, `original` (the text encoder before
tuning, None where it does not learn), `reward`, `constraint` and `watch` (the last two may be None), `chain` and
`tuned_fraction`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tc_lightning.backbone import Backbone
from tc_lightning.conditioning import Conditioning, constant, guidance_pair, switch, tuned_from
from tc_lightning.rewards.base import BoundReward, Reward
from tc_lightning.rewards.mix import RewardMix
from tc_lightning.rewards.shared import shared_features
from tc_lightning.sampling import sample
from tc_lightning.trainable import check_names, keep_trainable, trainable_names

Optimizer = Callable[..., torch.optim.Optimizer]
Schedulers = Callable[[torch.optim.Optimizer], LRScheduler]


def frozen_original(backbone: Backbone) -> nn.Module | None:
    """A frozen copy of the text encoder, unless the text encoder does not learn."""
    return None if backbone.modes["text_encoder"] == "frozen" else backbone.frozen_text_encoder()


def constraint_mix(constraint: Reward | None, backbone: Backbone) -> RewardMix | None:
    """The constraint as a mix of one, bound to the text encoder in training where it asks for it."""
    if isinstance(constraint, BoundReward):
        constraint.bind(backbone.text_encoder, backbone.tokenizer)
    return RewardMix(constraint=constraint) if constraint is not None else None


def check_something_learns(method: LightningModule) -> None:
    """Raises ValueError where no parameter has a gradient."""
    if not trainable_names(method):
        raise ValueError("nothing learns: tune.text_encoder and tune.unet are both frozen")


def pair(backbone: Backbone, prompts: Sequence[str], text_encoder: nn.Module) -> Tensor:
    """Embeddings [2B, L, D] of B prompts, null first, both of one text encoder."""
    embeds = backbone.encode(["", *prompts], text_encoder)
    return guidance_pair(embeds[:1], embeds[1:])


def condition(method: LightningModule, prompts: Sequence[str], first_tuned_step: int, start: int = 0) -> Conditioning:
    """The original text before `first_tuned_step` and the tuned text from it on; null embeddings likewise.

    Of a chain that begins at `start` the text that it does not meet is not computed.
    """
    tuned = pair(method.backbone, prompts, method.backbone.text_encoder)
    if method.original is None or first_tuned_step <= start:
        return constant(tuned)
    with torch.no_grad():
        original = pair(method.backbone, prompts, method.original)
    return switch(original, tuned, first_tuned_step)


def climbed(method: LightningModule, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The rewards' weighted sum [B], the constraint's [B], and every term by name, with their graph where there is one.

    A score that is not finite raises FloatingPointError; under a Guard (`on_nonfinite`) it makes the step one to be skipped.
    """
    try:
        with shared_features():  # a constraint that stands on a reward's CLIP does not run it again
            total, scores = method.reward(images, prompts)
            held, terms = method.constraint(images, prompts) if method.constraint is not None else (0.0 * total, {})
        return total, held, scores | terms
    except FloatingPointError as error:
        if method.on_nonfinite is None:
            raise
        method.on_nonfinite(error)
        # not-a-number in every process' gradient, and the same names to log: all of them skip this step together
        nothing = images.flatten(1).sum(1) * float("nan")
        mixes = [mix for mix in (method.reward, method.constraint) if mix is not None]
        return nothing, nothing, {name: nothing for mix in mixes for name in mix.rewards}


def log_terms(method: LightningModule, loss: Tensor, total: Tensor, terms: dict[str, Tensor]) -> None:
    """Log train/loss, train/reward (the rewards' sum without the constraint) and each term."""
    options = {"batch_size": len(total), "sync_dist": True}  # the mean over all processes
    method.log_dict({f"train/{name}": value.detach().mean() for name, value in terms.items()}, **options)
    method.log("train/loss", loss.detach(), **options)
    method.log("train/reward", total.detach().mean(), prog_bar=True, **options)


@torch.no_grad()
def all_scores(method: LightningModule, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Every score [B] by name: `total` (the rewards' weighted sum), each reward, the constraint, what is watched."""
    with shared_features():
        total, scores = method.reward(images, prompts)
        named = {"total": total, **scores}
        for mix in (method.constraint, method.watch):
            named |= mix(images, prompts)[1] if mix is not None else {}
    return named


@torch.no_grad()
def sample_images(method: LightningModule, prompts: Sequence[str], seeds: Sequence[int], tuned: bool = True) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] as at test time, or the original model's with `tuned=False` (text only)."""
    first = tuned_from(method.chain.timesteps, method.tuned_fraction) if tuned else len(method.chain)
    return sample(method.backbone, method.chain, condition(method, prompts, first), seeds)


@torch.no_grad()
def log_validation(method: LightningModule, batch: dict[str, list]) -> None:
    """Score dev prompts sampled as at test time; logs val/total and val/<name>, and watch/<name> for what is watched."""
    prompts = batch["prompts"]
    watched = method.watch.rewards if method.watch is not None else {}
    for name, value in method.score(method.sample(prompts, batch["seeds"]), prompts).items():
        key = f"watch/{name}" if name in watched else f"val/{name}"
        method.log(key, value.mean(), prog_bar=name == "total", batch_size=len(prompts), sync_dist=True)


def log_weights(method: LightningModule) -> None:
    """Log the weights of the terms, once."""
    mixes = [mix for mix in (method.reward, method.constraint) if mix is not None]
    weights = {f"weight/{name}": reward.weight for mix in mixes for name, reward in mix.rewards.items()}
    for logger in method.loggers if method.trainer.is_global_zero else ():
        logger.log_metrics(weights, method.global_step)


def log_optimizer(method: LightningModule, optimizer: torch.optim.Optimizer) -> None:
    """Log the gradient's norm before clipping, and the learning rate."""
    method.log("train/lr", float(optimizer.param_groups[0]["lr"]))
    norms = [parameter.grad.norm() for parameter in method.parameters() if parameter.grad is not None]
    if norms:  # none in a step that a Guard skips
        method.log("train/grad_norm", torch.stack(norms).norm())


def optimizers(method: LightningModule, optimizer: Optimizer, lr_scheduler: Schedulers | None) -> Any:
    """The optimizer over exactly the parameters that learn, with its learning rate's schedule if there is one."""
    made = optimizer([parameter for parameter in method.parameters() if parameter.requires_grad])
    if lr_scheduler is None:
        return made
    return {"optimizer": made, "lr_scheduler": {"scheduler": lr_scheduler(made), "interval": "step"}}


class Method(LightningModule):
    """Lightning's hooks that every method has alike; what a method learns from is its own `training_step`.

    Beside the attributes above it has `optimizer` and `lr_scheduler`.
    """

    def on_train_start(self) -> None:
        """Log the weights of the terms, once."""
        log_weights(self)

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Every score [B] by name: `total` (the rewards' weighted sum), each reward, the constraint, what is watched."""
        return all_scores(self, images, prompts)

    def validation_step(self, batch: dict[str, list], batch_index: int) -> None:
        """Score dev prompts sampled as at test time; logs val/total and val/<name>, and watch/<name> for what is watched."""
        log_validation(self, batch)

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], tuned: bool = True) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] as at test time, or the original model's with `tuned=False` (text only)."""
        return sample_images(self, prompts, seeds, tuned)

    def configure_optimizers(self) -> Any:
        """The optimizer over exactly the parameters that learn, with its learning rate's schedule if there is one."""
        return optimizers(self, self.optimizer, self.lr_scheduler)

    def train(self, mode: bool = True) -> Method:
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
