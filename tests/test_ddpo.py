"""DDPO: densities against torch.distributions, advantages and the policy gradient by hand, what it refuses, that it learns."""

import contextlib

import pytest
import torch
from small_runs import SMALL, door, refused, small_pipeline, train
from torch.distributions import Normal, kl_divergence

import tc_lightning as tc
from tc_lightning.advantages import PromptStatistics
from tc_lightning.rewards.base import FunctionReward
from tc_lightning.trainable import gradient_report, trainable_names

PROMPTS = ["a red circle", "a blue cross on the left"]
BATCH = {"prompts": PROMPTS, "seeds": [1, 2]}


def bright(images, prompts):
    """Numbers without a graph."""
    return [float(image.mean()) for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def make(folder):
    def build(text_encoder="full", unet="frozen", **options):
        backbone = tc.Backbone.load(folder).tune(text_encoder, unet, rank=2)
        options = {"steps": 3, "guidance_scale": 3.0, "tuned_fraction": 1.0, "samples_per_prompt": 2} | options
        return tc.DDPO(backbone, tc.RewardMix(bright=FunctionReward(bright)), **options)

    return build


def alone(module, learning_rate=0.0):
    """The module outside a trainer, with plain gradient descent."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    module.optimizers = lambda: optimizer
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.manual_backward = lambda loss: loss.backward()
    module.clip_gradients = lambda *args, **kwargs: None
    module.unsynchronised = contextlib.nullcontext
    return module


def test_log_densities_are_those_of_torch_distributions(make):
    module = make()
    rollout = module.roll_out(PROMPTS, [3, 4])
    conditioning = module.backbone and tc.ddpo.method.condition(module, PROMPTS, 0)
    assert rollout.latents.shape == (4, 2, 4, 8, 8) and rollout.log_probs.shape == (3, 2)
    for i in module.learning_steps:
        x = rollout.latents[i]
        mean, std = module.distribution(x, module.chain.noise_pred(x, i, conditioning), i)
        expected = Normal(mean, std.expand_as(mean)).log_prob(rollout.latents[i + 1]).mean((1, 2, 3))
        torch.testing.assert_close(rollout.log_probs[i], expected, rtol=1e-5, atol=1e-5)


def test_rollouts_are_functions_of_their_seeds(make):
    module = make()
    whole = module.roll_out(PROMPTS, [3, 4]).latents
    alone = module.roll_out(PROMPTS[1:], [4]).latents
    torch.testing.assert_close(whole[:, 1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[-1], module.roll_out(PROMPTS, [5, 4]).latents[-1])


def test_the_last_step_without_noise_is_left_out(make):
    module = make()
    assert module.learning_steps == [0, 1, 2]  # set_alpha_to_one is false in Stable Diffusion
    module.chain._alpha_bars[-1] = (module.chain._alpha_bars[-1][0], torch.tensor(1.0))
    assert module.learning_steps == [0, 1]
    module.roll_out(PROMPTS, [3, 4])
    half = make(tuned_fraction=0.5)
    assert half.learning_steps == [2] and make("full", "lora", tuned_fraction=0.5).learning_steps == [0, 1, 2]


def test_advantages_by_hand():
    statistics = PromptStatistics(size=4, least=3)
    first = statistics(["a", "a", "b"], torch.tensor([1.0, 3.0, 8.0]))  # too few each: the batch's mean and deviation
    batch = torch.tensor([1.0, 3.0, 8.0])
    torch.testing.assert_close(first, (batch - 4) / batch.std(correction=0))
    second = statistics(["a", "b", "a"], torch.tensor([5.0, 0.0, 7.0]))
    own, now = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([5.0, 0.0, 7.0])
    expected = [(5 - 4) / own.std(correction=0), (0 - 4) / now.std(correction=0), (7 - 4) / own.std(correction=0)]
    torch.testing.assert_close(second, torch.stack(expected))
    statistics(["a"], torch.tensor([100.0]))
    assert list(statistics.rewards["a"]) == [3.0, 5.0, 7.0, 100.0]
    again = PromptStatistics(size=4, least=3)
    again.load_state_dict(statistics.state_dict())
    assert again.state_dict() == statistics.state_dict()
    assert PromptStatistics(clip=0.5)(["a", "b"], torch.tensor([0.0, 1.0])).tolist() == [-0.5, 0.5]
    assert PromptStatistics()(["a", "b"], torch.tensor([2.0, 2.0])).tolist() == [0.0, 0.0]
    statistics(["c", "a"], torch.tensor([float("nan"), 1.0]))  # a step that will be skipped
    assert "c" not in statistics.rewards and list(statistics.rewards["a"]) == [5.0, 7.0, 100.0, 1.0]


def test_the_first_update_is_the_policy_gradient(make):
    """Where the ratio is 1, the gradient is that of -mean(advantage x log-density), summed over steps / their number."""
    module = alone(make())
    rollout, advantages = module.roll_out(PROMPTS, [3, 4]), torch.tensor([1.0, -0.5])
    total = 0.0
    for i in module.learning_steps:
        x = rollout.latents[i]
        conditioning = tc.ddpo.method.condition(module, PROMPTS, 0)
        mean, std = module.distribution(x, module.chain.noise_pred(x, i, conditioning), i)
        density = Normal(mean, std.expand_as(mean)).log_prob(rollout.latents[i + 1]).mean((1, 2, 3))
        total = total - (advantages * density).mean() / 3
    names = trainable_names(module)
    expected = torch.autograd.grad(total, [dict(module.named_parameters())[name] for name in names])
    module.update(rollout, advantages)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(dict(module.named_parameters())[name].grad, gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("modes", [("full", "frozen"), ("lora", "full"), ("frozen", "lora")], ids="-".join)
def test_gradient_on_exactly_what_learns(modes, make):
    module = alone(make(*modes, kl_weight=0.1))
    module.training_step(BATCH, 0)
    report = gradient_report(module)
    assert report["leaked"] == [] and report["without"] == [] and report["with"] == trainable_names(module)
    learning = {part for part, mode in module.backbone.modes.items() if mode != "frozen"}
    assert {name.split(".")[1] for name in report["with"]} == learning
    moving = [p.grad.abs().sum() > 0 for n, p in module.named_parameters() if p.requires_grad and "lora_A" not in n]
    assert sum(moving) / len(moving) > 0.9


def test_the_ratio_is_clipped(make):
    """Beyond the range, in the direction of the advantage, there is no gradient."""
    module = alone(make(clip_range=1e-4))
    rollout, advantages = module.roll_out(PROMPTS, [3, 4]), torch.tensor([1.0, 1.0])
    rollout.log_probs = rollout.log_probs - 0.01  # as if the steps had become likelier
    terms = module.step_loss(rollout, advantages, 1)
    assert terms["clipped"] == 1 and terms["loss"].item() == pytest.approx(-1.0001)
    terms["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    back = module.step_loss(rollout, -advantages, 1)["loss"]
    back.backward()
    assert any(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("unet", ["frozen", "full", "lora"])
def test_divergence_is_that_of_torch_distributions(unet, make):
    module = make("full", unet, kl_weight=0.1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    rollout = module.roll_out(PROMPTS, [3, 4])
    x, untouched = rollout.latents[1], tc.Backbone.load(module.backbone.source["source"])
    ours, theirs = (
        module.distribution(x, tc.Chain(b.unet, b.noise_scheduler, 3, 3.0).noise_pred(x, 1, conditioning), 1)
        for b, conditioning in (
            (module.backbone, tc.ddpo.method.condition(module, PROMPTS, 0)),
            (untouched, tc.conditioning.constant(tc.ddpo.method.pair(untouched, PROMPTS, untouched.text_encoder))),
        )
    )
    expected = kl_divergence(*(Normal(mean, std.expand_as(mean)) for mean, std in (ours, theirs))).mean()
    found = module.divergence(x, *ours, PROMPTS, 1)
    assert expected > 0 and found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert module.divergence(x, *theirs, PROMPTS, 1).item() == pytest.approx(0, abs=1e-8)


def test_costs(make):
    module, calls = alone(make(epochs=2)), []
    hook = module.backbone.unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    module.training_step(BATCH, 0)
    hook.remove()
    forwards, backwards = module.cost()
    assert (len(calls), sum(calls)) == (2 * forwards, 2 * backwards)  # two epochs
    assert module.images_per_prompt == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 0.0}, r"method.eta=0.0: a step without noise has no density"),
        ({"eta": 1.5}, "accepted: above 0, at most 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"clip_range": 0.0}, "clip_range=0.0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"advantage_clip": 0.0}, "clip=0.0"),
        ({"kept_rewards": 1}, "size=1, least=4"),
        ({"tuned_fraction": 0.0}, "no step learns"),
    ],
)
def test_bad_settings_are_refused_at_construction(options, words, make):
    with pytest.raises(ValueError, match=words):
        make(**options)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("method.eta=0",), "method.eta=0"),
        (("trainer.accumulate_grad_batches=2",), "trainer.accumulate_grad_batches=1"),
        (("regularizer=[embedding_drift]",), "takes no regularizer"),
        (("tune.text_encoder=frozen",), "both frozen"),
    ],
)
def test_the_door_refuses(overrides, words, tmp_path):
    refused(door("train", *SMALL, "method=ddpo", *overrides, f"hydra.run.dir={tmp_path / 'run'}"), words)


def test_a_reward_without_gradient_needs_ddpo(tmp_path):
    done = door("train", *SMALL, "reward=[oracle]", f"hydra.run.dir={tmp_path / 'run'}")
    refused(done, "reward facts has no gradient", "method=ddpo")


@pytest.mark.full
def test_two_steps_are_one_and_one(tmp_path):
    """The oracle as reward, the trained prompts' statistics and the noise go on where they were."""
    options = ("method=ddpo", "reward=[oracle]", "constraint=none", "method.samples_per_prompt=2", "tuned_fraction=1.0")
    options += ("callbacks=default", "prompts.heldout=2", "val.every=100", "checkpoint_every=1")
    whole = train(tmp_path / "whole", *options, "max_steps=2")
    train(tmp_path / "parts", *options, "max_steps=1")
    parts = train(tmp_path / "parts", *options, "max_steps=2", "ckpt_path=last")
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert one["state_dict"].keys() == two["state_dict"].keys() and one["prompt_statistics"] == two["prompt_statistics"]
    assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"])
    assert whole["metrics"] == parts["metrics"] and whole["samples"] == 8 and one["prompt_statistics"]


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_a_reward_without_gradient_rises(tmp_path):
    """Pixels brighter than the middle, counted, on the embedded model and four prompts: paired on other noise, above zero."""
    from pytorch_lightning import Trainer

    from tc_lightning.noise import derive_seed
    from tc_lightning.prompts import PromptData
    from tc_lightning.report import bootstrap
    from tc_lightning.tiny.shapes import captions

    def count(images, prompts):
        return (images > 0.5).flatten(1).sum(1).tolist()

    backbone = tc.Backbone.load("tiny").tune("frozen", "full")
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)  # noqa: E731
    options = {"steps": 5, "guidance_scale": 1.0, "tuned_fraction": 1.0, "gradient_clip_val": 1.0, "optimizer": optimizer}
    module = tc.DDPO(backbone, tc.RewardMix(count=FunctionReward(count)), **options)
    four = captions(4, 0, "train")
    prompts, seeds = four * 8, [derive_seed(9, i) for i in range(32)]  # noise that training never sees
    before = torch.tensor(count(module.sample(prompts, seeds), prompts), dtype=torch.float64)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=20, default_root_dir=str(tmp_path), limit_val_batches=0, **quiet)
    trainer.fit(module, PromptData(four, batch_size=4))
    after = torch.tensor(count(module.sample(prompts, seeds), prompts), dtype=torch.float64)
    gain = bootstrap((after - before).numpy())
    print(f"pixels brighter than the middle: {before.mean():.0f} to {after.mean():.0f}, {gain}")
    assert gain.low > 0
