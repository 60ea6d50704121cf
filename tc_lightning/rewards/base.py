"""What a reward is: a metric of images and prompts whose value carries a gradient."""

import importlib
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.exceptions import TorchMetricsUserError

RANGE_TOLERANCE = 1e-3  # images may leave [0, 1] by rounding, not by more


class Reward(Metric):
    """Score of generated images, higher is better; the same call is a term of the loss and an epoch metric.

    A subclass writes only ``score(images, prompts) -> [B]``. Calling the reward returns these scores with their graph and adds
    their detached values to the epoch mean, which :meth:`compute` returns (over all processes). Every network that is set as an
    attribute is frozen and kept in eval mode. Scores are computed outside autocast, in fp32 or in the ``dtype`` of the towers.

    Args:
        weight: factor of this term in a :class:`~tc_lightning.rewards.RewardMix`, >= 0.
        name: how messages call this reward; by default the class name in lower case.

    Attributes:
        differentiable: whether ``score`` has a gradient in the images; False is refused where a loss is made of it.

    Raises:
        ValueError: negative or non-finite weight.
    """

    full_state_update = False
    is_differentiable = True
    higher_is_better = True
    differentiable: bool = True

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__()
        self.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        self.weight = check_weight(weight, self.name)
        self.add_state("score_sum", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("score_count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1] (fp32 or fp64) against prompts (B strings)."""
        raise NotImplementedError(f"{type(self).__name__} must define score(images, prompts) -> [B]")

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B], fp32 or fp64, with their graph; the epoch state is left alone and no value is looked at."""
        images = check_batch(images, prompts, self.name)
        with torch.autocast(images.device.type, enabled=False):
            scores = self.score(images, list(prompts))
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"reward {self.name}: score must return a tensor of shape ({len(images)},), got {got}")
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def record(self, scores: Tensor) -> None:
        """Adds detached scores [B] to the epoch mean."""
        if self._is_synced:
            raise TorchMetricsUserError(f"reward {self.name} is synced across processes: call unsync() before scoring")
        with torch.no_grad():
            self.score_sum = self.score_sum + scores.detach().sum().to(self.score_sum)
            self.score_count = self.score_count + len(scores)
            self._forward_cache = scores.detach().mean()  # what Lightning logs on a step; never a graph
        self._update_count += 1
        self._computed = None

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] with their graph; their detached values enter the epoch mean.

        Args:
            images: [B, 3, H, W] in [0, 1], floating point, any size.
            prompts: B strings.

        Raises:
            ValueError: shape, range, type or number of the inputs.
            FloatingPointError: a score is not finite; names the reward and the prompt.
        """
        scores = self.evaluate(images, prompts)
        check_values(images, {self.name: scores}, prompts)
        self.record(scores)
        return scores

    def update(self, images: Tensor, prompts: Sequence[str]) -> None:
        """Adds a batch to the epoch mean, without a graph."""
        self._update_count -= 1  # torchmetrics counted this call, and record counts it too
        with torch.no_grad():
            self.forward(images, prompts)

    def compute(self) -> Tensor:
        """Mean score since the last reset, over all processes: a scalar."""
        return self.score_sum / self.score_count

    def cast(self, dtype: torch.dtype | str | None) -> "Reward":
        """Moves the towers to a dtype (bf16 on a GPU); preprocessing, heads and cosines stay in fp32. None changes nothing."""
        if dtype is not None:
            for module in self.children():
                module.to(as_dtype(dtype))
        return self

    def train(self, mode: bool = True) -> "Reward":
        """Does nothing: a reward is always in eval mode (the heads have dropout)."""
        return super().train(False)

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, nn.Module):
            value.requires_grad_(False).eval()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable, *args, **kwargs) -> "Reward":
        # A cast of the parent module moves the running sum to its dtype: move it to the device only.
        before = {key: (getattr(self, key), self._defaults[key]) for key in self._defaults}
        super()._apply(fn, *args, **kwargs)
        for key, (value, default) in before.items():
            device = getattr(self, key).device
            setattr(self, key, value.to(device))
            self._defaults[key] = default.to(device)
        return self


class BoundReward(Reward):
    """A reward that scores with the text encoder in training: the method calls bind before the first step."""

    def bind(self, text_encoder: nn.Module, tokenizer: object) -> "BoundReward":
        """Takes the live text encoder and its tokenizer; neither is registered here."""
        raise NotImplementedError(f"{type(self).__name__} must define bind(text_encoder, tokenizer)")


class FunctionReward(Reward):
    """Any callable as a reward: ``function(images, prompts) -> [B]`` numbers or a tensor.

    Args:
        function: the callable, or its dotted path ("package.module.name").
        differentiable: True if the result carries a gradient in the images; by default the reward serves evaluation and DDPO only.
        weight, name: as in :class:`Reward`; the name is by default the function's.
    """

    def __init__(
        self,
        function: Callable | str,
        weight: float = 1.0,
        name: str | None = None,
        differentiable: bool = False,
    ) -> None:
        if isinstance(function, str):
            function = _import(function)
        if not callable(function):
            raise ValueError(f"FunctionReward needs a callable f(images, prompts) -> [B], got {type(function).__name__}")
        super().__init__(weight, name or getattr(function, "__name__", type(function).__name__).lower())
        self.function = function
        self.differentiable = differentiable

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            scores = self.function(images, prompts)
        return torch.as_tensor(scores, device=images.device)


def _import(path: str) -> Callable:
    module, _, attribute = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no function at {path!r} (expected package.module.name): {error}") from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.bfloat16 from "bf16", "bfloat16" or itself; likewise fp16, fp32, fp64."""
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    found = getattr(torch, short.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype {dtype!r} is not one of bfloat16, float16, float32, float64")
    return found


def check_weight(weight: float, name: str) -> float:
    """The weight as a float; a negative one is refused, as the loss would then chase bad images without a bound."""
    weight = float(weight)
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"weight of reward {name} is {weight}, it must be finite and >= 0: the loss is -sum(weight * score), so a negative "
            "weight trains towards a low score. To hold something back use a constraint, or write a reward with the negated score"
        )
    return weight


def check_batch(images: Tensor, prompts: Sequence[str], name: str) -> Tensor:
    """Checks type, shape and number without reading a value; returns images in fp32 (fp64 stays)."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"reward {name}: images must be a tensor [B, 3, H, W], got {got}")
    if not images.is_floating_point():
        raise ValueError(f"reward {name}: images must be floating point in [0, 1], got {images.dtype}; divide bytes by 255")
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"reward {name}: prompts must be a list of strings, one an image")
    if len(prompts) == 0:
        raise ValueError(f"reward {name}: the list of prompts is empty")
    if len(prompts) != len(images):
        raise ValueError(f"reward {name}: {len(images)} images but {len(prompts)} prompts, one prompt an image is needed")
    return images.to(torch.promote_types(images.dtype, torch.float32))


def check_values(images: Tensor, scores: dict[str, Tensor], prompts: Sequence[str]) -> None:
    """Checks the range of the images and that scores are finite; waits for the device once, however many rewards there are.

    Raises:
        ValueError: images outside [0, 1].
        FloatingPointError: a score, or an image, is not finite; names the reward and the prompts.
    """
    with torch.no_grad():
        low, high = images.detach().aminmax()
        inside = (low >= -RANGE_TOLERANCE) & (high <= 1 + RANGE_TOLERANCE)
        finite = [value.detach().isfinite().all() for value in scores.values()]
        if bool(torch.stack([inside, *finite]).all()):
            return
        bad_images = [prompt for prompt, image in zip(prompts, images.detach(), strict=True) if not image.isfinite().all()]
        if bad_images:
            raise FloatingPointError(f"images are not finite (NaN or infinity) for prompts {bad_images}")
        if not bool(inside):
            raise ValueError(f"images must lie in [0, 1], got [{float(low):.4g}, {float(high):.4g}]")
        for name, value in scores.items():
            for prompt, number in zip(prompts, value.tolist(), strict=True):
                if not math.isfinite(number):
                    raise FloatingPointError(f"reward {name} gave {number} for the prompt {prompt!r}")
