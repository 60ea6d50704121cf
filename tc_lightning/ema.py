"""Exponential moving average of what learns, and of nothing else.

Lightning's own callback copies the whole module, frozen networks and rewards included, and its checkpoints then hold other
names than ours, which hold the trainable ones alone. Here the average is kept in the callback's state.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from tc_lightning.trainable import trainable_names


class EMA(Callback):
    """Averages the trainable weights over optimizer steps; validation, the end's scores and the exported model use the average.

    After step n the average moves by 1 - d towards the weights, with d = min(decay, (1 + n) / (10 + n)), so that a short run
    is not held at its start. Checkpoints hold the weights in training and, under `callbacks`, the average: a resumed run
    goes on exactly. Pictures and watches in the midst of training show the weights in training. To stand before callbacks
    that measure at the end (BeforeAfter, SampleGrid).

    Args:
        decay: d for a long run, from 0 (the weights themselves) to below 1.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}, accepted: 0 to below 1 (callbacks.ema.decay)")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average.

        Raises:
            ValueError: the checkpoint's average is of other parameters.
        """
        weights = _weights(pl_module)
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in weights.items()}
        odd = sorted(self.average.keys() ^ weights.keys())
        if odd:
            raise ValueError(f"the checkpoint's moving average is of other parameters, the first is {odd[0]}; check tune")
        self.average = {name: value.to(weights[name].device) for name, value in self.average.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the average, once a step of the optimizer."""
        if trainer.global_step == self._step:
            return  # amid accumulated batches
        self._step = trainer.global_step
        rate = 1 - min(self.decay, (1 + self._step) / (10 + self._step))
        for name, value in _weights(pl_module).items():
            self.average[name].lerp_(value.to(self.average[name].dtype), rate)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the weights on."""
        self._swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average is what the run ends with; the weights in training stay in the checkpoint."""
        self._swap_in(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Back to the weights in training, should the run have stopped in a validation."""
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint's weights are those in training, the average in use or not."""
        checkpoint["state_dict"] |= {name: value.clone() for name, value in self._raw.items()}

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"average": {name: value.detach().cpu().clone() for name, value in self.average.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.average = dict(state_dict["average"])

    @torch.no_grad()
    def _swap_in(self, module: LightningModule) -> None:
        if self._raw or not self.average:
            return
        for name, value in _weights(module).items():
            self._raw[name] = value.detach().clone()
            value.copy_(self.average[name])

    @torch.no_grad()
    def _swap_out(self, module: LightningModule) -> None:
        weights = _weights(module)
        for name, value in self._raw.items():
            weights[name].copy_(value)
        self._raw = {}


def _weights(module: LightningModule) -> dict[str, Tensor]:
    names = set(trainable_names(module))
    return {name: value for name, value in module.named_parameters() if name in names}
