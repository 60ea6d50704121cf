"""What the UNet is told at each step."""

import pytest
import torch

from tc_lightning.chain import timestep_list
from tc_lightning.conditioning import constant, guidance_pair, mix, switch, tuned_from


def embeds(value, rows=4):
    return torch.full((rows, 3, 5), float(value))


def test_constant_carries_further_unet_arguments():
    condition = constant(embeds(1), added_cond_kwargs={"time_ids": embeds(2)})
    assert condition(0) is not condition(0) and condition(0).keys() == {"encoder_hidden_states", "added_cond_kwargs"}
    assert torch.equal(condition(24)["encoder_hidden_states"], embeds(1))


@pytest.mark.parametrize("first", [0, 1, 5])
def test_switch_is_original_before_and_tuned_from(first):
    condition = switch(embeds(0), constant(embeds(1)), first)
    seen = [float(condition(i)["encoder_hidden_states"].mean()) for i in range(5)]
    assert seen == [0.0] * first + [1.0] * (5 - first) and condition.first_tuned_step == first


@pytest.mark.parametrize("null_rows", [1, 2])
def test_guidance_pair_is_null_first(null_rows):
    pair = guidance_pair(embeds(0, null_rows), embeds(1, 2))
    assert torch.equal(pair, torch.cat([embeds(0, 2), embeds(1, 2)]))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 1.5])
def test_mix_of_two_is_interpolation(weight):
    a, b = torch.randn(2, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mix([a, b], [1 - weight, weight]), torch.lerp(a, b, weight))


def test_mix_of_four_styles_has_gradient_by_weight():
    parts = [embeds(i).requires_grad_() for i in range(4)]
    mix(parts, [0.1, 0.7, 0.1, 0.1]).sum().backward()
    assert [round(float(part.grad[0, 0, 0]), 6) for part in parts] == [0.1, 0.7, 0.1, 0.1]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_paper_window_is_15_of_25(spacing):
    assert 25 - tuned_from(timestep_list(25, spacing, steps_offset=1), 0.6) == 15


@pytest.mark.parametrize("steps", [1, 7, 15, 25, 50])
def test_window_by_time_counts_the_steps_below_it(steps):
    timesteps = timestep_list(steps, "trailing")
    for fraction in (0.0, 0.2, 0.28, 0.6, 0.999, 1.0):
        assert steps - tuned_from(timesteps, fraction) == sum(t < round(1000 * fraction) for t in timesteps)
    assert tuned_from(timesteps, 0.0) == steps and tuned_from(timesteps, 1.0) == 0


def test_window_does_not_suffer_from_rounding():
    assert tuned_from([280, 240], 0.28) == 1


def test_errors_say_what_is_accepted():
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="tuned_fraction"):
            tuned_from([999], fraction)
    with pytest.raises(ValueError, match="sum to 0.9"):
        mix([embeds(0), embeds(1)], [0.5, 0.4])
    with pytest.raises(ValueError, match="2 embeddings and 1 weights"):
        mix([embeds(0), embeds(1)], [1.0])
    with pytest.raises(ValueError, match="null .3, 3, 5. and cond .2, 3, 5."):
        guidance_pair(embeds(0, 3), embeds(1, 2))
    with pytest.raises(ValueError, match="first_tuned_step=-1"):
        switch(embeds(0), embeds(1), -1)
    with pytest.raises(ValueError, match="differ in shape"):
        switch(embeds(0, 4), embeds(1, 2), 1)
    with pytest.raises(ValueError, match="embeds of shape"):
        constant(torch.zeros(3, 5))
