"""The chain against diffusers' DDIMScheduler, and its ways of keeping activations against each other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DConditionModel

from tc_lightning import ddim
from tc_lightning.chain import Chain, timestep_list
from tc_lightning.conditioning import constant, guidance_pair, switch

ARGS = {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = [1, 5, 10, 15, 25, 50]


class Formula(torch.nn.Module):
    """A UNet's signature with a formula inside; remembers the inputs of each call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None):
        self.calls.append((sample, timestep, encoder_hidden_states, added_cond_kwargs))
        text = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=torch.tanh(sample * 0.5 + text + timestep.view(-1, 1, 1, 1) / 1000))


def real_unet(dtype=torch.float32):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return unet.to(dtype).eval().requires_grad_(False)


def inputs(batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
    return draw(batch, 4, 8, 8), guidance_pair(draw(1, 3, 8), draw(batch, 3, 8))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_timesteps_are_diffusers(spacing, offset):
    scheduler = DDIMScheduler(**ARGS, timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)
        # At T = 61, 103, ... diffusers' trailing list has a step T + 1 at t = -1.
        expected = [t for t in scheduler.timesteps.tolist() if t >= 0]
        assert timestep_list(steps, spacing, 1000, offset) == expected and len(expected) == steps


def test_timesteps_of_the_paper_and_of_stock_stable_diffusion():
    scheduler = DDIMScheduler(**ARGS, steps_offset=1)
    assert Chain(None, scheduler).timesteps == list(range(999, 0, -40))
    assert Chain(None, scheduler, timestep_spacing="leading").timesteps == list(range(961, 0, -40))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, to_one", [("trailing", True), ("leading", False), ("linspace", True)])
def test_trajectory_is_diffusers(spacing, to_one, prediction_type, steps):
    x, embeds = inputs()
    options = {"prediction_type": prediction_type, "steps_offset": 1, "set_alpha_to_one": to_one}
    chain = Chain(Formula(), DDIMScheduler(**ARGS, **options), steps, timestep_spacing=spacing)
    reference = DDIMScheduler(**ARGS, **options, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert chain.timesteps == reference.timesteps.tolist() and len(chain) == steps
    ours = theirs = x
    for i, t in enumerate(reference.timesteps):
        null, cond = chain.unet(torch.cat([theirs] * 2), t.expand(4), embeds).sample.chunk(2)
        result = reference.step(null + 7.5 * (cond - null), t, theirs)
        x0 = chain.predict_x0(theirs, i, constant(embeds))
        torch.testing.assert_close(x0, result.pred_original_sample, atol=1e-6, rtol=1e-6)
        ours, theirs = chain.step(ours, i, constant(embeds)), result.prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert torch.equal(chain.run(x, constant(embeds)), ours)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_step_with_eta_is_diffusers(eta):
    x, embeds = inputs()
    reference = DDIMScheduler(**ARGS, timestep_spacing="trailing")
    reference.set_timesteps(25)
    chain, noise = Chain(Formula(), reference), torch.ones_like(x)
    for i in (0, 12, 24):
        output = chain.noise_pred(x, i, constant(embeds))
        expected = reference.step(output, chain.timesteps[i], x, eta=eta, variance_noise=noise).prev_sample
        ours = chain.step(x, i, constant(embeds), eta=eta, noise=noise)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDPMScheduler])
def test_any_scheduler_is_read_and_left_as_it_was(scheduler):
    args = {key: value for key, value in ARGS.items() if key != "clip_sample"}
    given = scheduler(**args, steps_offset=1)
    given.set_timesteps(7)
    before, config = given.timesteps.clone(), dict(given.config)
    x, embeds = inputs()
    ours = Chain(Formula(), given).run(x, constant(embeds))
    expected = DDIMScheduler(**ARGS, steps_offset=1, set_alpha_to_one=scheduler is not PNDMScheduler)
    torch.testing.assert_close(ours, Chain(Formula(), expected).run(x, constant(embeds)))
    assert torch.equal(given.timesteps, before) and dict(given.config) == config


def test_run_is_its_pieces_and_calls_the_unet_once_a_step():
    x, embeds = inputs()
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 10)
    whole = chain.run(x, constant(embeds))
    assert [len(call[0]) for call in chain.unet.calls] == [4] * 10
    assert [int(call[1][0]) for call in chain.unet.calls] == chain.timesteps
    assert torch.equal(chain.run(chain.run(x, constant(embeds), stop=6), constant(embeds), start=6), whole)
    assert torch.equal(chain.run(x, constant(embeds), 4, 4), x)


def test_without_guidance_the_unet_sees_the_conditioned_half_once():
    x, embeds = inputs()
    ids = torch.arange(8.0).view(4, 2)
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 3, guidance_scale=1.0)
    result = chain.run(x, constant(embeds, added_cond_kwargs={"time_ids": ids}))
    assert [len(call[0]) for call in chain.unet.calls] == [2] * 3
    assert torch.equal(chain.unet.calls[0][3]["time_ids"], ids[2:])
    assert torch.equal(chain.run(x, constant(embeds[2:])), result)
    almost = Chain(Formula(), DDIMScheduler(**ARGS), 3, guidance_scale=1.0 + 1e-7).run(x, constant(embeds))
    torch.testing.assert_close(almost, result, atol=1e-5, rtol=1e-5)


def test_switch_changes_the_text_at_its_step():
    x, embeds = inputs()
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 5)
    chain.run(x, switch(embeds, embeds + 1, 3))
    assert [torch.equal(call[2], embeds) for call in chain.unet.calls] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("keep, recomputed", [("all", 0), ("none", 4), (0, 4), (1, 3), (3, 1), (9, 0)])
def test_recomputing_changes_calls_but_neither_value_nor_gradient(keep, recomputed):
    unet = real_unet()
    results = []
    for setting in ("all", keep):
        x, embeds = inputs()
        x.requires_grad_(), embeds.requires_grad_()
        calls = []
        hook = unet.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        latents = Chain(unet, DDIMScheduler(**ARGS), 4, keep_activations=setting).run(x, constant(embeds))
        results.append((latents, *torch.autograd.grad(latents.square().sum(), (x, embeds))))
        hook.remove()
    assert len(calls) == 4 + recomputed
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


def test_nothing_is_recomputed_or_stored_without_gradient():
    x, embeds = inputs()
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 4, keep_activations="none")
    with torch.no_grad():
        latents = chain.run(x, constant(embeds.requires_grad_()))
    assert len(chain.unet.calls) == 4 and not latents.requires_grad


@pytest.mark.parametrize("keep", ["all", "none"])
def test_latents_stay_fp32_under_autocast(keep):
    x, embeds = inputs()
    chain = Chain(real_unet(), DDIMScheduler(**ARGS), 2, keep_activations=keep)
    seen = []
    chain.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        latents = chain.run(x, constant(embeds.requires_grad_()))
    latents.sum().backward()
    assert latents.dtype == torch.float32 and set(seen) == {torch.bfloat16} and embeds.grad.isfinite().all()


def test_float64_chain():
    x, embeds = inputs(dtype=torch.float64)
    chain = Chain(real_unet(torch.float64), DDIMScheduler(**ARGS), 3)
    latents = chain.run(x, constant(embeds))
    assert latents.dtype == torch.float64
    single = Chain(chain.unet.float(), DDIMScheduler(**ARGS), 3).run(x.float(), constant(embeds.float()))
    torch.testing.assert_close(single, latents.float(), atol=1e-3, rtol=1e-3)


def test_zero_terminal_snr_works_for_v_prediction_only():
    x, embeds = inputs()
    options = {**ARGS, "rescale_betas_zero_snr": True}
    chain = Chain(Formula(), DDIMScheduler(**options, prediction_type="v_prediction"))
    assert chain.run(x, constant(embeds)).isfinite().all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        Chain(Formula(), DDIMScheduler(**options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps=0, accepted: 1 to 1000"),
        ({"steps": 1001}, "steps=1001, accepted: 1 to 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0, accepted: 0 or more"),
        ({"guidance_scale": np.nan}, "guidance_scale=nan"),
        ({"timestep_spacing": "karras"}, "'karras', accepted: leading, trailing, linspace"),
        ({"keep_activations": "some"}, "'some', accepted: 'auto', 'all', 'none' or a number"),
        ({"keep_activations": -1}, "keep_activations=-1"),
        ({"keep_activations": True}, "keep_activations=True"),
        ({"steps": 1000, "timestep_spacing": "leading"}, "starts at t=1000"),
    ],
)
def test_construction_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Chain(Formula(), DDIMScheduler(**ARGS, steps_offset=1), **options)


def test_use_errors():
    x, embeds = inputs()
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 5)
    with pytest.raises(ValueError, match="'sample', accepted: epsilon, v_prediction"):
        Chain(Formula(), DDIMScheduler(**ARGS, prediction_type="sample"))
    with pytest.raises(ValueError, match="has 2 rows, accepted: 4 for 2 latents"):
        chain.run(x, constant(embeds[2:]))
    with pytest.raises(ValueError, match="start=3, stop=2"):
        chain.run(x, constant(embeds), 3, 2)
    for i in (-1, 5):
        with pytest.raises(ValueError, match=f"step {i}, accepted: 0 to 4"):
            chain.step(x, i, constant(embeds))
    with pytest.raises(ValueError, match="needs noise"):
        chain.step(x, 0, constant(embeds), eta=1.0)


def test_alpha_bar_serves_the_functions_of_ddim():
    x, embeds = inputs()
    chain = Chain(Formula(), DDIMScheduler(**ARGS), 5)
    output = chain.noise_pred(x, 2, constant(embeds))
    mean, std = ddim.step_distribution(x, output, *chain.alpha_bar(2), chain.prediction_type, eta=0.0)
    assert torch.equal(mean, chain.step(x, 2, constant(embeds))) and std == 0
