"""Penalties by hand, and in the loss of a training step."""

import pytest
import torch
from small_runs import SMALL, door, refused, small_pipeline, train

import tc_lightning as tc
from tc_lightning import ddim
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.regularizers import EmbeddingDrift, NoiseDistance, RewardCeiling, Step, original_conditioning
from tc_lightning.rewards.base import FunctionReward
from tc_lightning.trainable import gradient_report, trainable_names

PROMPTS = ["a red circle", "a blue cross on the left"]
BATCH = {"prompts": PROMPTS, "seeds": [1, 2]}


def bright(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def make(folder):
    def build(text_encoder="full", unet="frozen", moved=False, **regularizers):
        backbone = tc.Backbone.load(folder).tune(text_encoder, unet, rank=2)
        reward = tc.RewardMix(bright=FunctionReward(bright, differentiable=True, weight=2.0))
        options = {"schedule": tc.LastK(2), "steps": 3, "guidance_scale": 3.0, "regularizers": regularizers}
        module = tc.TextCraftor(backbone, reward, **options)
        module.logged = {}
        module.log = lambda name, value, **_: module.logged.update({name: float(value)})
        module.log_dict = lambda values, **_: module.logged.update({name: float(value) for name, value in values.items()})
        if moved:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                        parameter.add_(0.02 * noise)
        return module

    return build


def step_of(module, scores=None):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning = module.condition(PROMPTS)
    return Step(latents, conditioning, original_conditioning(module, PROMPTS), scores or {}, [1, 2], 0, module.first_gradient_step)


@pytest.mark.parametrize("modes", [("full", "frozen"), ("frozen", "full"), ("full", "lora")], ids="-".join)
def test_noise_distance_by_hand(modes, make, folder):
    """Zero before anything moved; then the squared difference from a model that is loaded afresh."""
    untouched = make(*modes, noise=NoiseDistance())
    assert untouched.regularizers["noise"](step_of(untouched)).item() == pytest.approx(0, abs=1e-9)
    module = make(*modes, moved=True, noise=NoiseDistance(seed=5))
    step, fresh, steps = step_of(module), tc.Backbone.load(folder), set()
    found = module.regularizers["noise"](step)
    chain = tc.Chain(fresh.unet, fresh.noise_scheduler, 3, 3.0)
    for i in (1, 2):  # one of the gradient steps was drawn
        noise = gaussian([1, 2], (4, 8, 8), derive_seed(5, 27, 0))
        x = ddim.add_noise(step.latents, noise, chain.alpha_bar(i)[0])
        distance = (module.chain.noise_pred(x, i, step.conditioning) - chain.noise_pred(x, i, step.original)).square().mean()
        steps |= {i} if distance.item() == pytest.approx(found.item(), rel=1e-4) else set()
    assert len(steps) == 1 and found > 0
    found.backward()
    assert gradient_report(module)["leaked"] == []


def test_embedding_drift_by_hand(make):
    module = make(moved=True, drift=EmbeddingDrift())
    tuned, original = (module.backbone.encode(PROMPTS, encoder) for encoder in (None, module.original))
    expected = ((tuned - original).flatten(1).norm(dim=1) / original.flatten(1).norm(dim=1)).square().mean()
    torch.testing.assert_close(module.regularizers["drift"](step_of(module)), expected)
    assert make(drift=EmbeddingDrift()).regularizers["drift"](step_of(make())) == 0


@pytest.mark.parametrize(("target", "expected"), [(False, lambda r: -2 * min(r, 0.4)), (True, lambda r: 2 * abs(r - 0.4) - 0.8)])
def test_a_ceiling_turns_the_rewards_part_of_the_loss(target, expected, make):
    module = make(ceiling=RewardCeiling({"bright": 0.4}, target=target))
    for value in (0.1, 0.4, 0.7):
        penalty = module.regularizers["ceiling"](step_of(module, {"bright": torch.tensor([value, value])}))
        assert -2 * value + penalty.item() == pytest.approx(expected(value))


def test_the_loss_adds_each_penalty_and_logs_it(make):
    plain, held = make(moved=True), make(moved=True, drift=EmbeddingDrift(3.0), noise=NoiseDistance(0.5))
    losses = [module.training_step(BATCH, 0) for module in (plain, held)]
    logged = held.logged
    penalty = 3.0 * logged["regularizer/drift"] + 0.5 * logged["regularizer/noise"]
    assert penalty > 0 and (losses[1] - losses[0]).item() == pytest.approx(penalty, rel=1e-4)
    assert logged["train/loss"] == pytest.approx(losses[1].item())
    losses[1].backward()
    assert gradient_report(held)["with"] == trainable_names(held)


def test_a_checkpoint_does_not_hold_the_original(make):
    module = make("frozen", "full", noise=NoiseDistance())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == trainable_names(module)


def test_refusals(make):
    with pytest.raises(ValueError, match="regularizer.drift.weight=-1.0, accepted: 0 or more"):
        make(drift=EmbeddingDrift(-1.0))
    with pytest.raises(ValueError, match="embedding_drift needs a text encoder that learns"):
        make("frozen", "lora", drift=EmbeddingDrift())
    with pytest.raises(ValueError, match="no reward 'hps' in at=.*the run has bright"):
        make(hinge=RewardCeiling({"hps": 1.0}))
    with pytest.raises(ValueError, match="no level"):
        make(hinge=RewardCeiling({}))


def test_the_door_names_the_missing_level(tmp_path):
    done = door("train", *SMALL, "regularizer=[hinge]", f"hydra.run.dir={tmp_path / 'run'}")
    refused(done, "regularizer.hinge.at must be given")


@pytest.mark.full
def test_all_of_them_from_the_door(tmp_path):
    options = ("regularizer=[noise_distance,embedding_drift,hinge,target]", "max_steps=1", "val.every=100", "prompts.heldout=2")
    levels = ("regularizer.hinge.at={tiny_preference: 1}", "regularizer.target.at={tiny_preference: 2}")
    train(tmp_path / "run", *options, *levels)
    head = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    for name in ("noise_distance", "embedding_drift", "hinge", "target"):
        assert f"regularizer/{name}" in head
