"""Schedules against finite differences, and against each other."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tc_lightning.chain import Chain
from tc_lightning.conditioning import constant, switch
from tc_lightning.schedules import FullChain, LastK


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 4}
    model = UNet2DConditionModel(sample_size=4, cross_attention_dim=8, mid_block_type=None, **blocks, **sizes)
    return model.double().eval().requires_grad_(False)


def chain_of(unet, steps=3, **options):
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return Chain(unet, scheduler, steps, **options)


def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 4, 4, 4), (2, 3, 8), (2, 3, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("keep", ["all", "none", 1])
@pytest.mark.parametrize("schedule", [FullChain(), LastK(1), LastK(2), LastK(3)])
def test_gradient_is_the_finite_difference(unet, schedule, keep):
    x, original, tuned = inputs()
    chain = chain_of(unet, keep_activations=keep)
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)

    def objective(embeds):
        # The tuned text enters at the first gradient step: then truncation leaves nothing out of the gradient.
        condition = switch(original, embeds, schedule.first_gradient_step(3))
        return (schedule(chain, x, condition) * weights).sum()

    tuned.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(tuned), tuned)
    assert (gradient[0].abs().sum() > 0) and (gradient[1].abs().sum() > 0)  # the null half learns as well
    for seed in range(3):
        direction = torch.randn(tuned.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            difference = (objective(tuned + 1e-5 * direction) - objective(tuned - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5])
def test_last_t_is_the_full_chain(unet, steps):
    x, embeds, _ = inputs()
    embeds.requires_grad_()
    results = [schedule(chain_of(unet, steps), x, constant(embeds)) for schedule in (FullChain(), LastK(steps))]
    gradients = [torch.autograd.grad(latents.square().sum(), embeds)[0] for latents in results]
    assert torch.equal(*results) and torch.equal(*gradients)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("start", [0, 1, None])
def test_latents_do_not_depend_on_k_or_start(unet, k, start):
    x, embeds, _ = inputs()
    chain, schedule = chain_of(unet, 6), LastK(k)
    start = schedule.first_gradient_step(6) if start is None else start
    with torch.no_grad():
        whole = chain.run(x, constant(embeds))
        entering = chain.run(x, constant(embeds), stop=start)
    assert torch.equal(schedule(chain, entering, constant(embeds), start), whole)


def test_only_the_last_k_steps_run_with_gradient(unet):
    x, embeds, _ = inputs()
    modes = []
    hook = unet.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    latents = LastK(2)(chain_of(unet, 5), x, constant(embeds.requires_grad_()))
    with torch.no_grad():
        silent = LastK(2)(chain_of(unet, 5), x, constant(embeds))
    hook.remove()
    assert modes == [False] * 3 + [True] * 2 + [False] * 5
    assert latents.requires_grad and not silent.requires_grad and torch.equal(latents, silent)


def test_truncated_steps_leave_no_graph(unet):
    x, embeds, _ = inputs()
    x.requires_grad_(), embeds.requires_grad_()
    LastK(2)(chain_of(unet, 4), x, constant(embeds)).sum().backward()
    assert x.grad is None and embeds.grad is not None


def test_first_gradient_step():
    schedules = [LastK(), LastK(25), FullChain()]
    assert [schedule.first_gradient_step(25) for schedule in schedules] == [20, 0, 0]


def test_errors_name_both_numbers(unet):
    x, embeds, _ = inputs()
    with pytest.raises(ValueError, match="k=0"):
        LastK(0)
    with pytest.raises(ValueError, match="k=6 .* steps=5"):
        LastK(6).first_gradient_step(5)
    with pytest.raises(ValueError, match=r"start=4, accepted: 0 to 3, .* LastK\(k=2\), T=5"):
        LastK(2)(chain_of(unet, 5), x, constant(embeds), start=4)
    with pytest.raises(ValueError, match="start=1, accepted: 0 to 0"):
        FullChain()(chain_of(unet, 5), x, constant(embeds), start=1)


def test_steps_without_gradient_do_not_starve_trainable_weights_under_autocast(unet):
    # Autocast keeps cast weights; casts made under no_grad must not serve the gradient steps.
    trainable = copy.deepcopy(unet).float().requires_grad_()
    x, embeds = (tensor.float() for tensor in inputs()[:2])
    with torch.autocast("cpu", torch.bfloat16):
        latents = LastK(1)(chain_of(trainable), x, constant(embeds))
    latents.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trainable.down_blocks.parameters())
