"""ddim against diffusers' DDIMScheduler, torch.distributions and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler

from tc_lightning import ddim

ARGS = {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tensors(count, shape=(3, 4, 5, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def pair(scheduler, t):
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[previous] if previous >= 0 else torch.tensor(1.0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [999, 519, 39])
def test_step_is_diffusers(prediction_type, eta, t):
    scheduler = DDIMScheduler(**ARGS, prediction_type=prediction_type)
    scheduler.set_timesteps(25)
    x, output, noise = tensors(3)
    reference = scheduler.step(output, t, x, eta=eta, variance_noise=noise)
    ours = ddim.step(x, output, *pair(scheduler, t), prediction_type, eta, noise)
    torch.testing.assert_close(ours, reference.prev_sample, atol=1e-6, rtol=1e-6)
    x0 = ddim.predict_x0(x, output, pair(scheduler, t)[0], prediction_type)
    torch.testing.assert_close(x0, reference.pred_original_sample, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predictions_rebuild_x_t(prediction_type):
    x, output = tensors(2, dtype=torch.float64)
    x0 = ddim.predict_x0(x, output, 0.3, prediction_type)
    noise = ddim.predict_noise(x, output, 0.3, prediction_type)
    torch.testing.assert_close(ddim.add_noise(x0, noise, 0.3), x)


def test_one_alpha_bar_per_sample_is_each_sample_alone():
    x, output, noise = tensors(3)
    now, previous = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.7, 1.0])
    batch = ddim.step(x, output, now, previous, eta=1.0, noise=noise)
    rows = [slice(i, i + 1) for i in range(3)]
    alone = [ddim.step(x[r], output[r], float(now[r]), float(previous[r]), eta=1.0, noise=noise[r]) for r in rows]
    torch.testing.assert_close(batch, torch.cat(alone))


def test_add_noise_is_diffusers():
    x0, noise = tensors(2)
    scheduler, t = DDIMScheduler(**ARGS), torch.tensor([1, 500, 999])
    ours = ddim.add_noise(x0, noise, scheduler.alphas_cumprod[t])
    torch.testing.assert_close(ours, scheduler.add_noise(x0, noise, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("now, previous", [(0.3, 0.4), (torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.7, 0.95]))])
def test_log_prob_is_torch_normal(now, previous):
    x, output, noise = tensors(3, dtype=torch.float64)
    mean, std = ddim.step_distribution(x, output, now, previous, eta=0.7)
    sample = ddim.step(x, output, now, previous, eta=0.7, noise=noise)
    torch.testing.assert_close(sample, mean + std * noise)
    reference = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(sample).sum((1, 2, 3))
    torch.testing.assert_close(ddim.log_prob(sample, mean, std), reference)


def test_step_distribution_with_eta_1_is_the_ddpm_posterior():
    x0, noise = tensors(2, dtype=torch.float64)
    now, previous = 0.3, 0.5
    x = ddim.add_noise(x0, noise, now)
    mean, std = ddim.step_distribution(x, noise, now, previous, eta=1.0)
    beta = 1 - now / previous  # Ho et al., DDPM, Eq. 7
    expected = (previous**0.5 * beta * x0 + (now / previous) ** 0.5 * (1 - previous) * x) / (1 - now)
    torch.testing.assert_close(mean, expected)
    assert float(std) ** 2 == pytest.approx((1 - previous) / (1 - now) * beta)


def test_guide_at_0_1_and_7_5():
    null, cond = tensors(2)
    assert torch.equal(ddim.guide(null, cond, 0.0), null)
    torch.testing.assert_close(ddim.guide(null, cond, 1.0), cond)
    torch.testing.assert_close(ddim.guide(null, cond, 7.5), 7.5 * cond - 6.5 * null)


def test_half_precision_input_keeps_alpha_bar_precise():
    x, output = (tensor.bfloat16() for tensor in tensors(2))
    now = torch.full((3,), 0.9991)  # 1.0 in bfloat16: sigma would vanish
    assert (ddim.add_noise(x * 0, output, now).float() / output.float()).mean() == pytest.approx(0.03, abs=1e-3)


def test_errors_say_what_is_accepted():
    x, output = tensors(2)
    for function in (ddim.predict_x0, ddim.predict_noise):
        with pytest.raises(ValueError, match="'sample', accepted: epsilon, v_prediction"):
            function(x, output, 0.5, "sample")
    with pytest.raises(ValueError, match="needs noise"):
        ddim.step(x, output, 0.5, 0.6, eta=1.0)
    with pytest.raises(ValueError, match="eta=1.5"):
        ddim.step(x, output, 0.5, 0.6, eta=1.5, noise=x)
    with pytest.raises(ValueError, match="no density"):
        ddim.log_prob(x, *ddim.step_distribution(x, output, 0.5, 1.0))
