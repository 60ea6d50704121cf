"""What makes the naive loop what it is, counted; that it has our gradient; and the arithmetic of the table."""

import sys
from pathlib import Path

import pytest
import torch
from small_runs import small_pipeline

import tc_lightning as tc
from tc_lightning.noise import gaussian
from tc_lightning.prefix import PrefixCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

PROMPTS, SEEDS, STEPS, K = ["a red circle", "a blue cross"], [1, 2], 6, 2


class Bright(torch.nn.Module):
    """A reward with weights of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.layer(images).square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


def calls(unet):
    counted = [0, 0]

    def count(*_):
        counted[torch.is_grad_enabled()] += 1

    unet.register_forward_pre_hook(count)
    return counted


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.fixture
def naive(pipeline):
    """The loop after one backward pass, and its counted calls."""
    from naive import NaiveLoop

    backbone = tc.Backbone.load(pipeline)
    parts = (backbone.tokenizer, backbone.text_encoder, backbone.vae, backbone.unet, backbone.noise_scheduler.config)
    loop = NaiveLoop(*parts, Bright(), STEPS, K, 3.0)
    counted = calls(backbone.unet)
    loop.loss(PROMPTS, gaussian(SEEDS, backbone.latent_shape)).backward()
    return loop, counted


@pytest.fixture
def ours(pipeline, tmp_path):
    bright = Bright().requires_grad_(False)
    reward = tc.RewardMix(bright=tc.rewards.FunctionReward(lambda images, prompts: bright(images), differentiable=True))
    options = {"steps": STEPS, "schedule": tc.LastK(K), "guidance_scale": 3.0, "keep_activations": "all"}
    module = tc.TextCraftor(tc.Backbone.load(pipeline), reward, prefix=PrefixCache(tmp_path), **options)
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def test_the_naive_loop_recomputes_each_gradient_step_and_makes_gradients_that_it_throws_away(naive):
    loop, counted = naive
    assert counted == [STEPS - K, 2 * K]
    assert all(p.grad is not None for p in loop.unet.parameters()), "weight gradients of the frozen UNet"
    assert all(p.grad is not None for p in [*loop.vae.decoder.parameters(), *loop.reward.parameters()])
    assert all(p.grad is None for p in loop.original.parameters())


def test_ours_makes_none_of_that_and_with_a_warm_store_no_step_before_the_gradient(ours):
    batch, counted = {"prompts": PROMPTS, "seeds": SEEDS}, calls(ours.backbone.unet)
    ours.training_step(batch, 0).backward()
    assert counted == [STEPS - K, K]
    assert all(p.grad is None for p in [*ours.backbone.unet.parameters(), *ours.backbone.vae.parameters()])
    ours.training_step(batch, 0).backward()
    assert counted == [STEPS - K, 2 * K]


def test_both_have_the_same_gradient(naive, ours):
    """Cold and warm, against a loop that shares no line with ours."""
    expected = gradient(naive[0].tuned)
    for _ in range(2):
        ours.zero_grad()
        ours.training_step({"prompts": PROMPTS, "seeds": SEEDS}, 0).backward()
        found = gradient(ours.backbone.text_encoder)
        assert torch.linalg.vector_norm(found - expected) <= 1e-4 * torch.linalg.vector_norm(expected)
    assert ours.prefix.hits == 2


def test_limits_of_a_ratio_are_student_s():
    from scipy import stats
    from speed import ratio

    over, under = [2.0, 2.2, 1.9, 2.1], [1.0, 1.05, 1.0, 0.95]
    logs = [torch.log(torch.tensor(a / b, dtype=torch.float64)).item() for a, b in zip(over, under, strict=True)]
    low, high = stats.t.interval(0.9, 3, loc=sum(logs) / 4, scale=stats.sem(logs))
    mean, below, above = ratio(over, under)
    assert [mean, below, above] == pytest.approx([torch.tensor(v).exp().item() for v in (sum(logs) / 4, low, high)], rel=1e-5)
    assert ratio([2.0], [1.0]) == (2.0, 0.0, float("inf"))


@pytest.mark.parametrize(("word", "says"), [("sise=mid", "no setting 'sise=mid'"), ("rows=fast", "rows=fast: accepted are naive")])
def test_a_wrong_word_is_one_message(word, says):
    from speed import settings

    with pytest.raises(SystemExit, match=says):
        settings([word])
