"""The names that learn: what a checkpoint holds, and proof that nothing else carries gradient."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def trainable_names(module: nn.Module) -> list[str]:
    """Names of the parameters that learn, in the order of the module."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def keep_trainable(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The part of a state dict that learns: frozen networks and rewards do not belong in a checkpoint."""
    names = set(trainable_names(module))
    return {name: value for name, value in state.items() if name in names}


def check_names(state: Mapping[str, Tensor], module: nn.Module) -> None:
    """A checkpoint must hold exactly the parameters that learn, in their shapes.

    Raises:
        ValueError: names the first missing, unexpected or differently shaped parameter.
    """
    shapes = {name: parameter.shape for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing = [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint is of another run: {len(missing)} parameters missing ({', '.join(missing[:3]) or 'none'}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3]) or 'none'}); check backbone and tune"
        )
    odd = [name for name, shape in shapes.items() if state[name].shape != shape]
    if odd:
        raise ValueError(f"the checkpoint's {odd[0]} is {tuple(state[odd[0]].shape)}, not {tuple(shapes[odd[0]])}")


def gradient_report(module: nn.Module) -> dict[str, list[str]]:
    """Names with a gradient and names that learn but have none; frozen parameters with a gradient under `leaked`."""
    report: dict[str, list[str]] = {"with": [], "without": [], "leaked": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            report["without" if parameter.grad is None else "with"].append(name)
        elif parameter.grad is not None:
            report["leaked"].append(name)
    return report
