"""What ends a long run badly, caught: gradients that are not finite, memory that does not suffice."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn


class Guard(Callback):
    """Skips a step whose loss or gradient is not finite, counts it, and ends the run after several in a row.

    A skipped step changes no weight and no moment of the optimizer; the step counter and the learning rate's schedule go on,
    so that data and noise stay a function of the step. Logs train/skipped, the steps skipped so far.

    Args:
        limit: skipped steps in a row that end the run.

    Raises:
        ValueError: a limit below 1.
        FloatingPointError: while training, after `limit` skipped steps in a row; names the reward and the prompts.
    """

    def __init__(self, limit: int = 5) -> None:
        if limit < 1:
            raise ValueError(f"guard.nonfinite_steps={limit}, accepted: 1 or more")
        self.limit = limit
        self.skipped = self.in_a_row = 0
        self._notes: list[str] = []
        self._prompts: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """From now on the method reports scores that are not finite instead of raising."""
        pl_module.on_nonfinite = lambda error: self._notes.append(str(error))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Scores that are not finite raise again."""
        pl_module.on_nonfinite = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Whose gradient this will be; several batches may make a step."""
        self._prompts += batch.get("prompts", []) if isinstance(batch, dict) else []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradient if it is not finite: an optimizer leaves parameters without one alone."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        notes, prompts, self._notes, self._prompts = self._notes, self._prompts, [], []
        if _all_finite(gradients):
            self.in_a_row = 0
        else:
            optimizer.zero_grad(set_to_none=True)
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self._say(trainer, notes or [f"the gradient is not finite for the prompts {prompts}"])
        pl_module.log("train/skipped", float(self.skipped))

    def _say(self, trainer: Trainer, notes: list[str]) -> None:
        # gradients were summed over all processes: all of them are here, but one of them knows why
        found: list[list[str]] = [notes]
        if trainer.world_size > 1:
            found = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(found, notes)
        named = [note for some in found for note in some]
        note = next((note for note in named if note.startswith(("reward", "images"))), named[0])
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {trainer.global_step}: {note}"
            )
        rank_zero_warn(f"step {trainer.global_step} skipped, {self.skipped} so far: {note}")

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _all_finite(gradients: list[torch.Tensor]) -> bool:
    if not gradients:
        return True
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded network
    return bool(norm.isfinite())


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(error: BaseException, module: LightningModule, trainer: Trainer, reward_dtype: str | None = None) -> str:
    """What was tried with which numbers, and the settings that would lower them, the cheapest first."""
    chain, batch = module.chain, trainer.datamodule.batch_size
    gradient = len(chain) - module.first_gradient_step
    modes = module.backbone.modes
    accumulate = trainer.accumulate_grad_batches
    knobs = []
    if chain.keep_activations != "none":
        knobs.append("chain.keep_activations=none (slower by about a third of the chain, the same numbers)")
    if batch > 1:
        less = batch // 2
        knobs.append(
            f"prompts.batch_size={less} trainer.accumulate_grad_batches={accumulate * -(-batch // less)} (the same samples a step)"
        )
    if reward_dtype is None:
        knobs.append("reward_dtype=bfloat16 (frozen reward towers at half the size)")
    if gradient > 1:
        knobs.append(f"schedule=last_k schedule.k={max(1, gradient // 2)} (fewer steps with gradient)")
    knobs += [f"tune.{part}=lora" for part, mode in modes.items() if mode == "full"]
    device = trainer.strategy.root_device
    peak = f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB at most so far" if device.type == "cuda" else ""
    size = module.backbone.image_size
    numbers = (
        f"batch_size={batch}, {size} x {size} pixels, gradient through {gradient} of {len(chain)} steps, "
        f"keep_activations={chain.keep_activations}, " + ", ".join(f"{part} {mode}" for part, mode in modes.items())
    )
    said = str(error).strip().splitlines()
    return (
        f"out of memory on {device} with {numbers}{peak}\n  ({said[0] if said else type(error).__name__})\n"
        + "what helps, the cheapest first:"
        + "".join(f"\n  {knob}" for knob in knobs)
    )
