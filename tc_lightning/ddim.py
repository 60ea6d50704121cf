"""One DDIM step in equations: predicted x_0, x_t -> x_{t-1}, its density, noising and guidance.

Notation: alpha_bar_t is the cumulative product of (1 - beta), in (0, 1]; alpha_t = sqrt(alpha_bar_t) and
sigma_t = sqrt(1 - alpha_bar_t), so that x_t = alpha_t x_0 + sigma_t noise. Everywhere `x_t`, `model_output` and `noise`
are [B, ...] in fp32 or wider, and an alpha_bar is a number, a scalar tensor or one value per sample, [B].

Sources: Song, Meng, Ermon, Denoising Diffusion Implicit Models, ICLR 2021 (DDIM); Salimans and Ho, Progressive
Distillation, ICLR 2022 (v prediction); Ho and Salimans, Classifier-Free Diffusion Guidance, 2022; Li et al.,
TextCraftor, CVPR 2024.
"""

import math

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def predict_x0(
    x_t: Tensor,
    model_output: Tensor,
    alpha_bar_t: float | Tensor,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The clean latents [B, ...] that the model sees behind x_t, unclipped.

    epsilon: (x_t - sigma_t eps) / alpha_t (TextCraftor Eq. 4, DDIM Eq. 9); v: alpha_t x_t - sigma_t v (Salimans and Ho,
    appendix D). Raises ValueError for another prediction type.
    """
    alpha, sigma = _signal_and_noise(alpha_bar_t, x_t)
    if _checked(prediction_type) == "epsilon":
        return (x_t - sigma * model_output) / alpha
    return alpha * x_t - sigma * model_output


def predict_noise(
    x_t: Tensor,
    model_output: Tensor,
    alpha_bar_t: float | Tensor,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The noise [B, ...] that the model sees in x_t.

    epsilon: the output itself; v: alpha_t v + sigma_t x_t (Salimans and Ho, appendix D). Raises ValueError for another
    prediction type.
    """
    if _checked(prediction_type) == "epsilon":
        return model_output
    alpha, sigma = _signal_and_noise(alpha_bar_t, x_t)
    return alpha * model_output + sigma * x_t


def step_distribution(
    x_t: Tensor,
    model_output: Tensor,
    alpha_bar_t: float | Tensor,
    alpha_bar_prev: float | Tensor,
    prediction_type: str = "epsilon",
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and standard deviation (scalar or [B, 1, ...]) of p(x_{t-1} | x_t), DDIM Eqs. 12 and 16.

    std = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)
    mean = alpha_prev x_0 + sqrt(1 - alpha_bar_prev - std^2) eps

    eta 0 is deterministic (std 0), eta 1 is DDPM's variance. Raises ValueError for eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta={eta}, accepted: 0 (deterministic) to 1 (DDPM)")
    x0 = predict_x0(x_t, model_output, alpha_bar_t, prediction_type)
    noise_pred = predict_noise(x_t, model_output, alpha_bar_t, prediction_type)
    now, prev = _like(alpha_bar_t, x_t), _like(alpha_bar_prev, x_t)
    variance = (1 - prev) / (1 - now) * (1 - now / prev)
    # With eta 1 the difference below may round to just under zero.
    direction = (1 - prev - eta**2 * variance).clamp(min=0).sqrt()
    return prev.sqrt() * x0 + direction * noise_pred, eta * variance.sqrt()


def step(
    x_t: Tensor,
    model_output: Tensor,
    alpha_bar_t: float | Tensor,
    alpha_bar_prev: float | Tensor,
    prediction_type: str = "epsilon",
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_{t-1} [B, ...] from x_t: TextCraftor Eq. 2 for eta 0, DDIM Eq. 12 for eta up to 1.

    Raises ValueError for eta outside [0, 1], and for eta > 0 without `noise` [B, ...]: no random number is drawn here.
    """
    mean, std = step_distribution(x_t, model_output, alpha_bar_t, alpha_bar_prev, prediction_type, eta)
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"eta={eta} needs noise of shape {tuple(x_t.shape)}, got None; draw it with noise.gaussian")
    return mean + std * noise


def log_prob(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density [B] of x_{t-1} under N(mean, std^2): the SUM (not the mean) over all dimensions but the first.

    `x_prev` and `mean` are [B, ...], `std` broadcasts to them. Raises ValueError when a std is zero: a deterministic
    step (eta 0, or the last one when set_alpha_to_one makes alpha_bar_prev 1) has no density and is to be left out.
    """
    if not bool((std > 0).all()):
        raise ValueError("std=0, accepted: std > 0; a deterministic step has no density (eta=0, or alpha_bar_prev=1)")
    terms = -0.5 * ((x_prev - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def add_noise(x0: Tensor, noise: Tensor, alpha_bar_t: float | Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t noise, [B, ...] (DDIM Eq. 4; the input of direct fine-tuning, TextCraftor 3.2.1)."""
    alpha, sigma = _signal_and_noise(alpha_bar_t, x0)
    return alpha * x0 + sigma * noise


def guide(noise_null: Tensor, noise_cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, TextCraftor Eq. 3: eps_null + w (eps_cond - eps_null), all [B, ...].

    It is linear with weights that sum to one, hence it serves v predictions as well.
    """
    return noise_null + guidance_scale * (noise_cond - noise_null)


def _checked(prediction_type: str) -> str:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r}, accepted: {', '.join(PREDICTION_TYPES)}")
    return prediction_type


def _signal_and_noise(alpha_bar: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = _like(alpha_bar, x)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _like(alpha_bar: float | Tensor, x: Tensor) -> Tensor:
    """alpha_bar in x's precision (at least fp32), shaped to broadcast over x.

    A scalar stays where it is: a scalar on the CPU multiplies a tensor on any device without a transfer.
    """
    alpha_bar = torch.as_tensor(alpha_bar).to(torch.promote_types(x.dtype, torch.float32))
    if alpha_bar.ndim == 0:
        return alpha_bar
    return alpha_bar.to(x.device).view(-1, *[1] * (x.ndim - 1))
