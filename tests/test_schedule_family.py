"""The schedules beside FullChain and LastK: formulas written by hand, limits that equal those two, draws, costs, refusals."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from tc_lightning.chain import Chain
from tc_lightning.conditioning import constant
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.schedules import (
    DRTune,
    FullChain,
    LastK,
    LowVariance,
    RandomK,
    SingleStep,
    StepList,
    at_step,
)

ALL = [FullChain(), LastK(2), RandomK(), LowVariance(), DRTune(k=2), DRTune(steps=(0, 2)), SingleStep(0.5), StepList((0, -1))]


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 4}
    model = UNet2DConditionModel(sample_size=4, cross_attention_dim=8, mid_block_type=None, **blocks, **sizes)
    return model.double().eval().requires_grad_(False)


def chain_of(unet, steps=4, keep="all", **options):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return Chain(unet, DDIMScheduler(clip_sample=False, **config), steps, 3.0, keep_activations=keep, **options)


def inputs():
    generator = torch.Generator().manual_seed(1)
    x, embeds = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 4, 4, 4), (2, 3, 8)))
    return x, embeds, torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)


def gradient_of(schedule, chain, rows=1):
    """x_0 and the gradient in the embeddings of a weighted sum of it."""
    x, embeds, weights = inputs()
    embeds.requires_grad_()
    latents = schedule(chain, x, constant(embeds))
    return latents.detach(), torch.autograd.grad((latents * weights).sum(), embeds)[0]


def trajectory(chain):
    """The latents that enter each step, and x_0; no gradient."""
    x, embeds, _ = inputs()
    with torch.no_grad():
        return [chain.run(x, constant(embeds), stop=i) for i in range(len(chain) + 1)]


def gradient_of_noise_pred(chain, x, i, factor):
    """Gradient in the embeddings of sum(factor * noise_pred) at fixed latents."""
    _, embeds, _ = inputs()
    embeds.requires_grad_()
    return torch.autograd.grad((factor * chain.noise_pred(x, i, constant(embeds))).sum(), embeds)[0]


def linear(chain, i):
    """DDIM's step as x' = a x + b eps."""
    now, prev = chain.alpha_bar(i)
    a = (prev / now).sqrt()
    return a.double(), ((1 - prev).sqrt() - a * (1 - now).sqrt()).double()


@pytest.mark.parametrize(
    ("schedule", "limit"),
    [
        (RandomK(2, 2), LastK(2)),
        (RandomK(4, 4), FullChain()),
        (StepList((2, 3)), LastK(2)),
        (StepList((-1, -2)), LastK(2)),
        (StepList(range(4)), FullChain()),
        (DRTune(steps=[-1]), LastK(1)),
    ],
)
def test_limits(schedule, limit, unet):
    for found, expected in zip(gradient_of(schedule, chain_of(unet)), gradient_of(limit, chain_of(unet)), strict=True):
        assert torch.equal(found, expected)


def test_last_t_is_the_full_chain(unet):
    for found, expected in zip(gradient_of(LastK(4), chain_of(unet)), gradient_of(FullChain(), chain_of(unet)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chosen", [(0,), (1, 3), (0, 1, 2, 3)])
def test_drtune_is_a_sum_over_the_chosen_steps(chosen, unet):
    """d x_0 = sum over chosen i of (product of a_j, j > i) b_i d eps_i, each eps_i at latents that are constants."""
    chain = chain_of(unet)
    path, weights = trajectory(chain), inputs()[2]
    expected = 0.0
    for i in chosen:
        factor = linear(chain, i)[1]
        for j in range(i + 1, len(chain)):
            factor = factor * linear(chain, j)[0]
        expected = expected + gradient_of_noise_pred(chain, path[i], i, factor * weights)
    latents, gradient = gradient_of(DRTune(steps=chosen), chain)
    torch.testing.assert_close(latents, path[-1])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-10)


def test_drtune_and_a_step_list_differ_by_the_jacobian_of_the_unet(unet):
    tuned, listed = (gradient_of(schedule, chain_of(unet))[1] for schedule in (DRTune(steps=(0, 3)), StepList((0, 3))))
    assert not torch.allclose(tuned, listed, rtol=1e-3)


def test_low_variance_by_hand(unet):
    """DRaFT-LV: the chain's last step, and one-call predictions from x_0 noised to that step's level."""
    chain, schedule = chain_of(unet), LowVariance(2, seed=3).at(7, [5])
    path, weights = trajectory(chain), inputs()[2]
    alpha_bar = chain.alpha_bar(3)[0].double()
    latents, expected = [path[-1]], gradient_of_noise_pred(chain, path[3], 3, linear(chain, 3)[1] * weights)
    for number in range(2):
        noise = gaussian([5], (4, 4, 4), derive_seed(3, 22, 7, number)).double()
        noised = alpha_bar.sqrt() * path[-1] + (1 - alpha_bar).sqrt() * noise
        eps = chain.noise_pred(noised, 3, constant(inputs()[1]))
        latents.append((noised - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt())
        factor = -((1 - alpha_bar) / alpha_bar).sqrt() * weights
        expected = expected + gradient_of_noise_pred(chain, noised, 3, factor)
    found, gradient = gradient_of(schedule, chain)
    assert found.shape == (3, 4, 4, 4)
    torch.testing.assert_close(found, torch.cat(latents), rtol=1e-5, atol=1e-6)  # alpha_bar is kept in fp32
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_single_step_by_hand(unet):
    chain = chain_of(unet)
    path, weights = trajectory(chain), inputs()[2]
    drawn = set()
    for step in range(12):
        latents, gradient = gradient_of(SingleStep(0.5).at(step, [0]), chain)
        predictions = [chain.predict_x0(path[i], i, constant(inputs()[1])) for i in (2, 3)]
        (which,) = [i for i, x0 in zip((2, 3), predictions, strict=True) if torch.equal(x0, latents)]
        drawn.add(which)
        alpha_bar = chain.alpha_bar(which)[0].double()
        expected = gradient_of_noise_pred(chain, path[which], which, -((1 - alpha_bar) / alpha_bar).sqrt() * weights)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert drawn == {2, 3}


def test_early_stop_ends_with_a_predicted_x0(unet):
    chain = chain_of(unet)
    path = trajectory(chain)
    ends = [path[3 - n] for n in range(3)]
    expected = [chain.predict_x0(x, 3 - n, constant(inputs()[1])) for n, x in enumerate(ends)]
    found = {
        next(n for n, x0 in enumerate(expected) if torch.equal(x0, gradient_of(schedule, chain)[0]))
        for schedule in (DRTune(steps=(0,), early_stop=2).at(step, []) for step in range(12))
    }
    assert found == {0, 1, 2}


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("keep", ["none", 1])
def test_recomputed_equals_kept(schedule, keep, unet):
    for found, expected in zip(
        gradient_of(schedule, chain_of(unet, keep=keep)), gradient_of(schedule, chain_of(unet)), strict=True
    ):
        assert torch.equal(found, expected)


class Counting(torch.nn.Module):
    """A UNet of one multiplication that counts its calls and those with a graph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, encoder_hidden_states):
        self.calls.append(torch.is_grad_enabled())
        return SimpleNamespace(sample=x * encoder_hidden_states.mean((1, 2))[:, None, None, None].tanh())


@pytest.mark.parametrize("schedule", [*ALL, DRTune(steps=(0, 1), early_stop=2)], ids=lambda schedule: type(schedule).__name__)
def test_costs_are_what_the_unet_counts(schedule):
    """Forwards, and forwards with a graph, each of which backward walks once; over many draws in the mean."""
    unet, draws = Counting(), 100 if isinstance(schedule, RandomK | DRTune | SingleStep) else 1
    for step in range(draws):
        gradient_of(at_step(schedule, step, [0]), chain_of(unet))
    cost = schedule.cost(4)
    assert len(unet.calls) / draws == pytest.approx(cost.forwards, abs=0.25 if draws > 1 else 0)
    assert sum(unet.calls) / draws == pytest.approx(cost.backwards, abs=0.25 if draws > 1 else 0)
    again = Counting()
    for step in range(draws):
        gradient_of(at_step(schedule, step, [0]), chain_of(again, keep="none"))
    assert len(again.calls) == len(unet.calls) + sum(unet.calls)


@pytest.mark.parametrize("schedule", ALL, ids=lambda schedule: type(schedule).__name__)
def test_draws_are_functions_of_seed_and_step(schedule, unet):
    state = torch.get_rng_state()
    chain = chain_of(unet)
    first, second = (gradient_of(at_step(schedule, 3, [9]), chain) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_random_k_draws_all_of_its_range_and_no_other():
    drawn = [RandomK(2, 5, seed=1).at(step, []).k(9) for step in range(200)]
    assert set(drawn) == {2, 3, 4, 5} and drawn != [RandomK(2, 5, seed=2).at(step, []).k(9) for step in range(200)]
    assert {RandomK().at(step, []).k(3) for step in range(50)} == {1, 2, 3}
    assert (RandomK(2, 5).first_gradient_step(9), RandomK().first_gradient_step(9)) == (4, 0)


def test_drtune_draws_steps_at_equal_distances():
    drawn = {tuple(DRTune(k=3).at(step, []).chosen(10)) for step in range(100)}
    assert drawn == {(0, 3, 6), (1, 4, 7), (2, 5, 8)}
    assert DRTune(k=3).first_gradient_step(10) == 0 and DRTune(steps=(-3, 9)).first_gradient_step(10) == 7


def test_low_variance_noise_is_each_rows_own(unet):
    """A row's copies do not depend on the other rows, on their order or on the size of the batch."""
    x, embeds, _ = inputs()
    both, pair = torch.cat([x, 2 * x]), torch.cat([embeds[:1], embeds[:1], embeds[1:], embeds[1:]])
    schedule = LowVariance(1).at(0, [3, 4])
    together = schedule(chain_of(unet), both, constant(pair))
    alone = LowVariance(1).at(0, [4])(chain_of(unet), 2 * x, constant(embeds))
    torch.testing.assert_close(together[1::2], alone)


@pytest.mark.parametrize("schedule", [RandomK(2, 3), LowVariance(1), DRTune(steps=(-2,)), SingleStep(0.5), StepList((-2, -1))])
def test_the_prefix_may_be_computed_elsewhere(schedule, unet):
    x, embeds, _ = inputs()
    chain, first = chain_of(unet), schedule.first_gradient_step(4)
    entering = trajectory(chain)[first]
    assert torch.equal(schedule(chain, entering, constant(embeds), first), schedule(chain, x, constant(embeds)))
    with pytest.raises(ValueError, match=f"start={first + 1}, accepted: 0 to {first}, where gradient begins"):
        schedule(chain, entering, constant(embeds), first + 1)


def test_steps_without_gradient_do_not_starve_trainable_weights_under_autocast(unet):
    import copy

    trainable = copy.deepcopy(unet).float().requires_grad_()
    x, embeds = (tensor.float() for tensor in inputs()[:2])
    with torch.autocast("cpu", torch.bfloat16):
        latents = StepList((0, 2))(chain_of(trainable), x, constant(embeds))
    latents.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trainable.down_blocks.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RandomK(0), "low=0 gradient steps, accepted: 1 or more"),
        (lambda: RandomK(3, 2), "low=3, high=2: accepted: 1 <= low <= high"),
        (lambda: RandomK(1, 5).first_gradient_step(4), "k=5 gradient steps in a chain of steps=4"),
        (lambda: RandomK(5).first_gradient_step(4), "k=5 gradient steps in a chain of steps=4"),
        (lambda: LowVariance(0), "samples=0 noised copies, accepted: 1 or more"),
        (lambda: DRTune(), "k=None, steps=None: accepted: one of the two"),
        (lambda: DRTune(k=2, steps=[1]), "accepted: one of the two"),
        (lambda: DRTune(k=5).first_gradient_step(4), "k=5 gradient steps in a chain of steps=4"),
        (lambda: DRTune(steps=[]), "at least one"),
        (lambda: DRTune(k=1, early_stop=4).first_gradient_step(4), "early_stop=4 in a chain of steps=4"),
        (lambda: DRTune(k=1, early_stop=-1), "early_stop=-1: accepted: 0"),
        (lambda: SingleStep(0.0), "fraction=0.0, accepted: above 0"),
        (lambda: SingleStep(1.5), "fraction=1.5, accepted"),
        (lambda: StepList([]), r"steps=\[\], accepted: a list of different steps, at least one \(schedule.steps\)"),
        (lambda: StepList([1, 1]), "a list of different steps"),
        (lambda: StepList([4]).first_gradient_step(4), r"steps=\[4\] in a chain of steps=4, accepted: different ones of -4 to 3"),
        (lambda: StepList([3, -1]).first_gradient_step(4), "different ones"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
