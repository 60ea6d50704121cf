"""The training step: what gets gradient, what a checkpoint holds, what is refused, and one loss trace."""

import copy

import pytest
import torch
from small_runs import small_pipeline
from torch.nn import functional as F

import tc_lightning as tc
from tc_lightning.noise import gaussian
from tc_lightning.rewards.base import BoundReward, FunctionReward, Reward
from tc_lightning.trainable import gradient_report, trainable_names

BATCH = {"prompts": ["a red circle", "a blue cross on the left"], "seeds": [1, 2]}


class Brightness(Reward):
    """A frozen network's score: differentiable, cheap, and blind to the prompt."""

    def __init__(self, weight=1.0):
        super().__init__(weight)
        self.network = torch.nn.Conv2d(3, 1, 3)
        torch.nn.init.constant_(self.network.weight, 0.1)
        torch.nn.init.zeros_(self.network.bias)

    def score(self, images, prompts):
        return self.network(images).mean((1, 2, 3))


class Live(BoundReward):
    """Needs the text encoder in training."""

    def bind(self, text_encoder, tokenizer):
        self.__dict__["bound"] = text_encoder
        return self

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def make(folder):
    def build(text_encoder="full", unet="frozen", **options):
        backbone = tc.Backbone.load(folder).tune(text_encoder, unet, rank=2)
        options = {"schedule": tc.LastK(1), "steps": 3, "guidance_scale": 3.0} | options
        reward = options.pop("reward", None) or tc.RewardMix(brightness=Brightness(2.0))
        return tc.TextCraftor(backbone, reward, **options)

    return build


def loss_of(module, batch=BATCH):
    """The loss of a step, outside a trainer."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module.training_step(batch, 0)


@pytest.mark.parametrize("unet", ["frozen", "lora", "full"])
@pytest.mark.parametrize("text_encoder", ["full", "lora"])
def test_gradient_on_exactly_the_trainable_names(text_encoder, unet, make):
    module = make(text_encoder, unet, constraint=Brightness(0.5), keep_activations="none")
    loss_of(module).backward()
    report = gradient_report(module)
    assert report["leaked"] == [] and report["without"] == [] and report["with"] == trainable_names(module)
    parts = {name.split(".")[1] for name in report["with"]}
    assert parts == {"text_encoder"} | ({"unet"} if unet != "frozen" else set())
    assert all(name.startswith("backbone.") for name in report["with"])
    modes = {"text_encoder": text_encoder, "unet": unet}
    assert all(("lora_" in name) == (modes[name.split(".")[1]] == "lora") for name in report["with"])
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, name
    moving = [p.grad.abs().sum() > 0 for n, p in module.named_parameters() if p.requires_grad and "lora_A" not in n]
    assert sum(moving) / len(moving) > 0.9


SCHEDULES = [tc.RandomK(), tc.LowVariance(1), tc.DRTune(k=2), tc.DRTune(steps=[0, 2]), tc.SingleStep(1.0), tc.StepList([0, -1])]


@pytest.mark.parametrize("modes", [("full", "frozen"), ("frozen", "lora"), ("lora", "full")], ids="-".join)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_every_schedule_gives_gradient_to_exactly_what_learns(schedule, modes, make):
    module = make(*modes, schedule=schedule, keep_activations="none")
    loss_of(module).backward()
    report = gradient_report(module)
    assert report["leaked"] == [] and report["without"] == [] and report["with"] == trainable_names(module)
    assert {name.split(".")[1] for name in report["with"]} == {
        part for part, mode in module.backbone.modes.items() if mode != "frozen"
    }
    moving = [p.grad.abs().sum() > 0 for n, p in module.named_parameters() if p.requires_grad and "lora_A" not in n]
    assert sum(moving) / len(moving) > 0.9


def test_both_parts_at_once_warn(make):
    with pytest.warns(UserWarning, match="the text encoder first, then the UNet"):
        make("full", "lora")


def test_unet_alone_can_learn(make):
    module = make("frozen", "full")
    assert module.original is None and {name.split(".")[1] for name in trainable_names(module)} == {"unet"}
    loss_of(module).backward()
    assert gradient_report(module)["leaked"] == []


def test_loss_is_minus_the_weighted_sum_of_a_hand_written_chain(make):
    """Algorithm 1 in plain torch with diffusers' own scheduler: original text first, tuned text in the last step."""
    from diffusers import DDIMScheduler

    module = make(constraint=Brightness(0.5))
    with torch.no_grad():
        for parameter in module.backbone.text_encoder.parameters():
            parameter.mul_(1.05)
    loss = loss_of(module)
    backbone = module.backbone
    scheduler = DDIMScheduler.from_config(backbone.noise_scheduler.config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(3)
    x = gaussian(BATCH["seeds"], backbone.latent_shape)
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            encoder = backbone.text_encoder if index == 2 else module.original
            null, cond = (encoder(backbone.tokenize(texts)).last_hidden_state for texts in (["", ""], BATCH["prompts"]))
            empty, told = (backbone.unet(x, t, embeds).sample for embeds in (null, cond))
            x = scheduler.step(empty + 3.0 * (told - empty), t, x).prev_sample
        images = (backbone.vae.decode(x / backbone.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        score = F.conv2d(images, torch.full((1, 3, 3, 3), 0.1)).mean().item()
    assert loss.item() == pytest.approx(-(2.0 + 0.5) * score, abs=1e-5)


def test_at_the_start_tuned_and_original_are_one_model(make):
    module = make(schedule=tc.FullChain())
    images = [module.sample(BATCH["prompts"], BATCH["seeds"], tuned) for tuned in (True, False)]
    assert torch.allclose(*images, atol=1e-6)
    assert torch.allclose(images[0][:1], tc.generate(module.backbone, BATCH["prompts"][:1], [1], 3, 3.0), atol=1e-5)


def test_sampling_uses_the_tuned_text_in_its_window_of_time(make):
    module = make(tuned_fraction=0.5)
    with torch.no_grad():
        module.backbone.text_encoder.get_input_embeddings().weight.mul_(-1)
    prompts, seeds = BATCH["prompts"], BATCH["seeds"]
    half = module.sample(prompts, seeds)
    by_count = module.condition(prompts, 2)  # t = 999, 666, 332: only the last is below 500
    assert torch.equal(half, module.backbone.decode(module.chain.run(gaussian(seeds, (4, 8, 8)), by_count)).detach())
    module.tuned_fraction = 0.0
    assert torch.equal(module.sample(prompts, seeds), module.sample(prompts, seeds, tuned=False))
    module.tuned_fraction = 1.0
    assert not torch.allclose(module.sample(prompts, seeds), half, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(make):
    module = make()
    prompts, seeds = [f"a {colour} circle" for colour in ("red", "blue", "green", "cyan")], [4, 5, 6, 7]
    whole = module.sample(prompts, seeds)
    single = torch.cat([module.sample([prompt], [seed]) for prompt, seed in zip(prompts, seeds, strict=True)])
    assert torch.allclose(whole, single, atol=1e-4)
    assert torch.allclose(module.sample(prompts[::-1], seeds[::-1]).flip(0), whole, atol=1e-4)


def test_rewards_and_frozen_parts_never_change_mode_or_gradient(make):
    module = make()
    module.train()
    assert module.training and not any(part.training for part in module.modules() if part is not module)
    assert not any(parameter.requires_grad for parameter in module.reward.parameters())


def test_checkpoint_holds_exactly_the_trainable_names(make):
    module = make("lora", "lora", constraint=Brightness())
    checkpoint = {"state_dict": module.state_dict()}
    assert len(checkpoint["state_dict"]) > 2 * len(trainable_names(module))
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["state_dict"]) == trainable_names(module)
    module.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_run_is_refused(make):
    other = {"state_dict": make("full").state_dict()}
    make("full").on_save_checkpoint(other)
    with pytest.raises(ValueError, match="the checkpoint is of another run: .* missing .* unexpected .*; check backbone and tune"):
        make("lora").on_load_checkpoint(other)


def test_two_runs_of_the_same_steps_have_the_same_losses(make):
    """The deterministic loss trace: one thread, bit for bit."""

    def trace():
        module = make()
        optimizer = module.configure_optimizers()
        losses = []
        for step in range(4):
            loss = loss_of(module, {"prompts": BATCH["prompts"], "seeds": [10 * step, 10 * step + 1]})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = trace(), trace()
    finally:
        torch.set_num_threads(threads)
    assert first == second and len(set(first)) == 4


def test_the_optimizer_gets_exactly_what_learns(make):
    module = make("full", "lora", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    optimizer = module.configure_optimizers()
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert given == {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert isinstance(optimizer, torch.optim.SGD) and isinstance(make().configure_optimizers(), torch.optim.AdamW)


def test_by_default_the_whole_text_encoder_learns(folder):
    module = tc.TextCraftor(tc.Backbone.load(folder), tc.RewardMix(brightness=Brightness()))
    assert {name.split(".")[1] for name in trainable_names(module)} == {"text_encoder"}
    assert (module.first_gradient_step, module.tuned_fraction, len(module.chain)) == (20, 0.6, 25)


def test_a_bound_constraint_gets_the_live_text_encoder(make):
    module = make(constraint=Live())
    assert module.constraint.rewards["constraint"].bound is module.backbone.text_encoder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": tc.LastK(9)}, "k=9 gradient steps in a chain of steps=3"),
        ({"tuned_fraction": 1.5}, "tuned_fraction=1.5, accepted: 0"),
        ({"steps": 0, "schedule": tc.FullChain()}, "steps=0, accepted: 1 to 1000"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0, accepted"),
        ({"constraint": FunctionReward(lambda images, prompts: [0.0] * len(prompts))}, "has no gradient"),
    ],
)
def test_bad_settings_are_refused_at_construction(options, words, make):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_scores_name_everything_and_train_nothing_that_is_watched(make):
    watch = tc.RewardMix(ones=FunctionReward(lambda images, prompts: [1.0] * len(prompts)))
    module = make(constraint=Brightness(0.5), watch=watch)
    scores = module.score(torch.rand(2, 3, 16, 16), BATCH["prompts"])
    assert list(scores) == ["total", "brightness", "constraint", "ones"]
    assert torch.allclose(scores["total"], 2 * scores["brightness"]) and not scores["total"].requires_grad


def test_the_module_can_be_copied_after_a_step(make):
    """torchmetrics keeps the last value, and its graph with it, unless told otherwise."""
    module = make()
    loss_of(module).backward()
    del module.log, module.log_dict
    copy.deepcopy(module)
