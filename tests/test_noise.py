"""Noise is f(seed) to the bit."""

import pytest
import torch

from tc_lightning.noise import derive_seed, gaussian

SEEDS = [0, 5, 2**63 - 1, 7, 7, 123456789012, 1, 42]


@pytest.mark.parametrize("salt", [0, 3])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_and_order_do_not_matter(batch, salt):
    whole = gaussian(SEEDS, (4, 8, 8), salt)
    pieces = [gaussian(SEEDS[i : i + batch], (4, 8, 8), salt) for i in range(0, 8, batch)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(gaussian(SEEDS[::-1], (4, 8, 8), salt), whole.flip(0))


def test_salt_0_is_torch_and_other_salts_are_other_draws():
    reference = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(42))
    assert torch.equal(gaussian([42], (4, 8, 8))[0], reference)
    salted = torch.cat([gaussian([42], (4, 64, 64), salt) for salt in range(4)]).flatten(1)
    assert (torch.corrcoef(salted) - torch.eye(4)).abs().max() < 0.03


def test_fp32_normal_on_the_cpu_and_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    noise = gaussian(range(16), (4, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu" and noise.shape == (16, 4, 32, 32)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_no_seeds_no_rows_and_integer_tensors_are_seeds():
    assert gaussian([], (4, 2, 2)).shape == (0, 4, 2, 2)
    assert torch.equal(gaussian(torch.tensor([3, 4]), (2,)), gaussian([3, 4], (2,)))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed={seed}, accepted"):
        gaussian([0, seed], (2,))


def test_derive_seed_never_changes():
    # half of: printf 1,2,3 | b2sum -l 64
    assert derive_seed(0) == 4761921975702974394
    assert derive_seed(1, 2, 3) == 8149998584550362645
    assert derive_seed(-1, 2**62) == 8784025940356364656


def test_derive_seed_is_63_bits_ordered_and_without_collisions():
    seeds = {derive_seed(a, b) for a in range(60) for b in range(60)} | {derive_seed(12), derive_seed(1, 2, 0)}
    assert len(seeds) == 3602 and all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(TypeError):
        derive_seed(0.5)
