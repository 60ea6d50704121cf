"""The planner counts what a step does, and leaves the module as it was."""

import pytest
import torch
from small_runs import SMALL, door, small_pipeline

import tc_lightning as tc
from tc_lightning.planner import Plan, plan
from tc_lightning.prefix import PrefixCache

BATCH = {"prompts": ["a red circle", "a blue cross"], "seeds": [1, 2]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.mark.parametrize(("keep", "calls", "gradient"), [("all", 5, 2), ("none", 7, 4), (1, 6, 3)])
def test_calls_are_those_of_a_step(keep, calls, gradient, pipeline, tmp_path):
    reward = tc.RewardMix(bright=tc.rewards.FunctionReward(lambda images, p: images.mean((1, 2, 3)), differentiable=True))
    options = {"schedule": tc.LastK(2), "steps": 5, "keep_activations": keep, "prefix": PrefixCache(tmp_path)}
    module = tc.TextCraftor(tc.Backbone.load(pipeline), reward, **options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = plan(module, BATCH, steps=10, world=2)
    assert (found.unet_calls, found.unet_gradient, found.recomputed, found.prefix_calls) == (calls, gradient, gradient - 2, 3)
    assert found.samples == 40 and found.flops > 1e6 and 0 < found.prefix_seconds < found.seconds
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters()) and module.prefix.store is None and not list(tmp_path.iterdir())
    assert "log" not in vars(module)


def test_flops_are_those_of_the_counter_and_time_pays_for_a_prefix_once():
    numbers = {"flops": 4e12, "peak_bytes": 2**30, "unet_calls": 25, "unet_gradient": 5, "recomputed": 0, "prefix_calls": 20}
    one = Plan(batch=2, steps=100, world=1, seconds=4.0, prefix_seconds=3.0, first_epochs_steps=10, **numbers)
    assert one.total_seconds == 10 * 4 + 90 * 1
    assert one.rows()["FLOPs a sample"] == "2 TFLOP, 1 TFLOP/s" and one.rows()["time"].startswith("2 min 10 s")
    plain = Plan(batch=2, steps=100, world=1, seconds=4.0, prefix_seconds=0.0, first_epochs_steps=100, **numbers)
    assert plain.total_seconds == 400 and "kept" not in plain.rows()["step"]


@pytest.mark.full
def test_plan_prints_and_trains_nothing(tmp_path):
    done = door("train", *SMALL, "plan=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.status == 0, done.err
    for word in ("3, 1 with gradient, 0 of them a second time", "2 steps, 4 samples", "peak memory", "without plan=true"):
        assert word in done.out, done.out
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "checkpoints").exists()
