"""The guided DDIM chain of a UNet, from pure noise x_T to clean latents x_0 (TextCraftor Eqs. 2 and 3, Algorithm 1)."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tc_lightning import ddim
from tc_lightning.activations import room, saved_bytes
from tc_lightning.conditioning import Conditioning

logger = logging.getLogger(__name__)
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


class Chain:
    """T guided DDIM steps; step i goes from timesteps[i] to the next lower noise level, i = 0 is the noisiest.

    Latents are [B, C, h, w] and keep their dtype (fp32 under autocast too); x_0 is never clipped. Nothing here switches
    gradient off: that is the caller's word, see schedules.

    Args:
        unet: called as `unet(latents, timesteps [n], **conditioning(i)).sample`.
        noise_scheduler: any diffusers scheduler with `alphas_cumprod`; read (prediction_type, num_train_timesteps,
            set_alpha_to_one, steps_offset), never changed.
        steps: T, from 1 to num_train_timesteps.
        guidance_scale: w of Eq. 3, at least 0. At exactly 1 there is no guidance: the UNet sees B rows instead of 2B,
            and the null half of the embeddings, where given, is dropped.
        timestep_spacing: trailing (999, 959, ..., 39 at T = 25, the paper's), leading (961, ..., 1 in stock Stable
            Diffusion) or linspace.
        keep_activations: what backward finds in memory: "all" steps, "none", the last n of a run, or "auto", which `settle`
            makes as many as the memory holds; the others are computed a second time. Values and gradients are the same.

    As in diffusers, step i leads to t - num_train_timesteps // T. Where T does not divide num_train_timesteps that is
    not always timesteps[i + 1] (T = 15, trailing: off by one); diffusers is followed, so that its pipelines give the
    same pictures.
    """

    def __init__(
        self,
        unet: nn.Module,
        noise_scheduler: Any,
        steps: int = 25,
        guidance_scale: float = 7.5,
        timestep_spacing: str = "trailing",
        keep_activations: str | int = "all",
    ) -> None:
        config = noise_scheduler.config
        self.unet = unet
        self.guidance_scale = _checked_guidance(guidance_scale)
        self.keep_activations = _checked_keep(keep_activations)
        self.step_bytes: int | None = None  # what one step keeps, once measured
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ddim.PREDICTION_TYPES:
            accepted = ", ".join(ddim.PREDICTION_TYPES)
            raise ValueError(f"noise scheduler's prediction_type={self.prediction_type!r}, accepted: {accepted}")
        self.num_train_timesteps = config.num_train_timesteps
        self.timesteps = timestep_list(steps, timestep_spacing, self.num_train_timesteps, config.get("steps_offset", 0))
        alpha_bars = noise_scheduler.alphas_cumprod.detach().cpu()
        final = torch.tensor(1.0) if config.get("set_alpha_to_one", True) else alpha_bars[0]
        previous = [t - self.num_train_timesteps // steps for t in self.timesteps]
        previous_alpha_bars = [alpha_bars[t] if t >= 0 else final for t in previous]
        self._alpha_bars = list(zip(alpha_bars[self.timesteps], previous_alpha_bars, strict=True))
        if self.prediction_type == "epsilon" and not self._alpha_bars[0][0] > 0:
            raise ValueError("alpha_bar is 0 at the first step (zero terminal SNR), accepted: v_prediction models only")

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha_bar(self, i: int) -> tuple[Tensor, Tensor]:
        """alpha_bar at step i and at the level it leads to: two scalars on the CPU, as ddim takes them."""
        if not 0 <= i < len(self):
            raise ValueError(f"step {i}, accepted: 0 to {len(self) - 1}")
        return self._alpha_bars[i]

    def noise_pred(self, x: Tensor, i: int, conditioning: Conditioning) -> Tensor:
        """The guided model output [B, C, h, w] at step i (Eq. 3), in x's dtype; v for a v-prediction model."""
        self.alpha_bar(i)
        # A tensor, filled on the device: an integer would cost a transfer a step, and a compiled UNet a compilation.
        return self.noise_pred_at(x, torch.full((x.shape[0],), self.timesteps[i], device=x.device), conditioning(i))

    def noise_pred_at(self, x: Tensor, timesteps: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The same at any training timesteps [B], a row's own each; `kwargs` are the UNet's arguments for x's rows."""
        guided = self.guidance_scale != 1.0
        kwargs = _rows(kwargs, x.shape[0], guided)
        model_input, t = (torch.cat([part, part]) if guided else part for part in (x, timesteps))
        output = self.unet(model_input, t, **kwargs).sample.to(x.dtype)
        return ddim.guide(*output.chunk(2), self.guidance_scale) if guided else output

    def step(
        self,
        x: Tensor,
        i: int,
        conditioning: Conditioning,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents after step i, [B, C, h, w]; eta > 0 adds its share of `noise` [B, C, h, w] (DDIM Eq. 12)."""
        return ddim.step(x, self.noise_pred(x, i, conditioning), *self.alpha_bar(i), self.prediction_type, eta, noise)

    def predict_x0(self, x: Tensor, i: int, conditioning: Conditioning) -> Tensor:
        """The clean latents [B, C, h, w] that the model sees from step i's input in one call (Eq. 4)."""
        return ddim.predict_x0(x, self.noise_pred(x, i, conditioning), self.alpha_bar(i)[0], self.prediction_type)

    def run(self, x: Tensor, conditioning: Conditioning, start: int = 0, stop: int | None = None) -> Tensor:
        """Latents after steps start, ..., stop - 1 (to the end by default), deterministic (eta 0).

        It carries gradient whenever gradient is enabled where it is called. Raises ValueError unless
        0 <= start <= stop <= T.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start={start}, stop={stop}, accepted: 0 <= start <= stop <= {len(self)}")
        kept = self.kept(stop - start)
        for i in range(start, stop):
            if torch.is_grad_enabled() and i < stop - kept:
                x = checkpoint(self.step, x, i, conditioning, use_reentrant=False)
            else:
                x = self.step(x, i, conditioning)
        return x

    def kept(self, steps: int) -> int:
        """How many of that many gradient steps keep their activations for backward: the last ones."""
        return min(steps, {"all": steps, "none": 0, "auto": 0}.get(self.keep_activations, self.keep_activations))

    def settle(self, x: Tensor, conditioning: Conditioning) -> None:
        """Before each training step's chain: "auto" measures a step first, and then becomes as many steps as fit.

        The measurement costs one UNet call; how much the rest of a training step takes is known when one has run.
        """
        if self.keep_activations != "auto":
            return
        if self.step_bytes is None:
            with torch.enable_grad(), saved_bytes() as count:
                self.step(x, len(self) - 1, conditioning)
            self.step_bytes = count()
        else:
            self.keep_activations = max(0, room(x.device) // max(1, self.step_bytes))
            logger.info("keep_activations=auto: up to %d steps of %.3g GB", self.keep_activations, self.step_bytes / 1e9)


def timestep_list(steps: int, spacing: str, num_train_timesteps: int = 1000, steps_offset: int = 0) -> list[int]:
    """Decreasing timesteps, the same as those of diffusers' DDIMScheduler (Lin et al., arXiv 2305.08891, Table 2).

    Raises ValueError for steps outside 1..num_train_timesteps, for an unknown spacing, and where the offset of leading
    spacing passes the last training timestep.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps={steps}, accepted: 1 to {num_train_timesteps} (num_train_timesteps)")
    if spacing == "trailing":
        # Rounding may give arange one value too many: with T = 61 diffusers would run 62 steps, the last at t = -1.
        levels = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)[:steps]
        timesteps = np.round(levels).astype(int) - 1
    elif spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (num_train_timesteps // steps) + steps_offset
    elif spacing == "linspace":
        timesteps = np.round(np.linspace(0, num_train_timesteps - 1, steps)).astype(int)[::-1]
    else:
        raise ValueError(f"timestep_spacing={spacing!r}, accepted: {', '.join(TIMESTEP_SPACINGS)}")
    if timesteps[0] >= num_train_timesteps:
        raise ValueError(
            f"leading spacing with steps={steps} and steps_offset={steps_offset} starts at t={timesteps[0]}, "
            f"accepted: below {num_train_timesteps}; take fewer steps or trailing spacing"
        )
    return timesteps.tolist()


def _checked_guidance(guidance_scale: float) -> float:
    if not guidance_scale >= 0:
        raise ValueError(f"guidance_scale={guidance_scale}, accepted: 0 or more (1 is no guidance)")
    return float(guidance_scale)


def _checked_keep(keep_activations: str | int) -> str | int:
    is_count = isinstance(keep_activations, int) and not isinstance(keep_activations, bool) and keep_activations >= 0
    if keep_activations not in ("auto", "all", "none") and not is_count:
        raise ValueError(f"keep_activations={keep_activations!r}, accepted: 'auto', 'all', 'none' or a number of steps >= 0")
    return keep_activations


def _rows(kwargs: dict[str, Any], batch: int, guided: bool) -> dict[str, Any]:
    """The conditioning's arguments in 2B rows with guidance, in B rows (the conditioned half) without."""
    given = kwargs["encoder_hidden_states"].shape[0]
    accepted = (2 * batch,) if guided else (2 * batch, batch)
    if given not in accepted:
        rows = " or ".join(map(str, accepted))
        raise ValueError(f"encoder_hidden_states has {given} rows, accepted: {rows} for {batch} latents (null first)")
    return kwargs if guided or given == batch else _second_half(kwargs, batch)


def _second_half(value: Any, batch: int) -> Any:
    if isinstance(value, dict):
        return {key: _second_half(inner, batch) for key, inner in value.items()}
    is_pair = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 2 * batch
    return value[batch:] if is_pair else value
