"""Steps that are not finite are skipped and counted, runs of them end with the prompt; out of memory says what helps."""

import math

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from small_runs import SMALL, door, refused, small_pipeline, train

import tc_lightning as tc
from tc_lightning.guard import Guard, memory_advice
from tc_lightning.prompts import PromptData
from tc_lightning.rewards.base import Reward

PROMPTS = [f"a red circle number {index}" for index in range(8)]


class Breaks(Reward):
    """The mean of the pixels, but not a number in the given calls."""

    def __init__(self, calls, value=math.nan):
        super().__init__(10.0, "breaks")
        self.calls, self.value, self.count = calls, value, 0

    def score(self, images, prompts):
        self.count += 1
        return images.mean((1, 2, 3)) * (self.value if self.count - 1 in self.calls else 1.0)


class Weights(Callback):
    """The tuned weights after each step, and the optimizer's count of its steps."""

    def __init__(self):
        self.after, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = trainer.optimizers[0].state
        moments = max((int(s["step"]) for s in state.values()), default=0)
        weights = torch.cat([p.detach().flatten() for p in pl_module.parameters() if p.requires_grad])
        self.after.append((weights.clone(), moments))
        self.logged.append(float(trainer.callback_metrics.get("train/skipped", 0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def fit(folder, tmp_path):
    def run(reward, guard, steps=4, accumulate=1, explode=()):
        module = tc.TextCraftor(
            tc.Backbone.load(folder), tc.RewardMix(breaks=reward), schedule=tc.LastK(1), steps=2, guidance_scale=2.0
        )

        class Explode(Callback):
            """A gradient that overflows though the loss did not."""

            def on_after_backward(self, trainer, pl_module):
                if trainer.global_step in explode:
                    next(p for p in pl_module.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf

        weights = Weights()
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[Explode(), *([guard] if guard else []), weights],
            accumulate_grad_batches=accumulate,
            default_root_dir=str(tmp_path),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, PromptData(PROMPTS, batch_size=2))
        return weights

    return run


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_score_is_not_finite_changes_nothing_and_is_counted(value, fit):
    guard = Guard(limit=2)
    said = r"step 1 skipped, 1 so far: reward breaks gave \S+ for the prompt 'a red circle number \d'"
    with pytest.warns(UserWarning, match=said):
        weights = fit(Breaks({1}, value), guard)
    (first, _), (second, moments), (third, _), _ = weights.after
    assert torch.equal(first, second) and not torch.equal(second, third) and moments == 1
    assert all(found.isfinite().all() for found, _ in weights.after)
    assert weights.logged == [0, 1, 1, 1] and (guard.skipped, guard.in_a_row) == (1, 0)


def test_a_gradient_that_is_not_finite_is_skipped_too(fit):
    guard = Guard()
    with pytest.warns(UserWarning, match=r"step 2 skipped, 1 so far: the gradient is not finite for the prompts \['a red"):
        weights = fit(Breaks(()), guard, explode={2})
    assert torch.equal(weights.after[1][0], weights.after[2][0]) and not torch.equal(weights.after[2][0], weights.after[3][0])


def test_a_broken_batch_takes_the_others_of_its_step_along(fit):
    guard = Guard()
    with pytest.warns(UserWarning, match="step 1 skipped"):
        weights = fit(Breaks({2}), guard, steps=2, accumulate=2)
    assert torch.equal(weights.after[1][0], weights.after[3][0]) and guard.skipped == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_several_in_a_row_end_the_run_with_reward_and_prompt(limit, fit):
    guard = Guard(limit)
    message = rf"{limit} steps in a row were not finite, the last at step {limit}: reward breaks gave nan for the prompt 'a red"
    with pytest.raises(FloatingPointError, match=message):
        fit(Breaks(range(1, 9)), guard, steps=8)
    assert guard.skipped == limit


def test_without_a_guard_a_score_that_is_not_finite_raises(fit):
    with pytest.raises(FloatingPointError, match="reward breaks gave nan"):
        fit(Breaks({0}), None)


def test_counts_survive_a_resume():
    guard, other = Guard(), Guard()
    guard.skipped, guard.in_a_row = 7, 2
    other.load_state_dict(guard.state_dict())
    assert (other.skipped, other.in_a_row) == (7, 2)


def test_a_limit_of_none_in_a_row_is_refused():
    refused(door("train", *SMALL, "guard.nonfinite_steps=0"), "guard.nonfinite_steps=0: accepted is a whole number, at least 1")


@pytest.mark.full
def test_out_of_memory_says_which_settings_help_with_this_runs_numbers(tmp_path, monkeypatch):
    from tc_lightning.rewards.pickscore import PickScore

    def full(self, images, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    options = ("~callbacks.before_after", "~callbacks.sample_grid", "chain.keep_activations=all", "prompts.batch_size=4")
    monkeypatch.setattr(PickScore, "score", full)
    done = door("train", *SMALL, *options, "chain.steps=4", "schedule.k=2", "val.every=0", f"hydra.run.dir={tmp_path / 'run'}")
    refused(
        done,
        "out of memory on cpu with batch_size=4, 32 x 32 pixels, gradient through 2 of 4 steps, keep_activations=all",
        "Tried to allocate 2.00 GiB",
        "chain.keep_activations=none",
        "prompts.batch_size=2 trainer.accumulate_grad_batches=2",
        "schedule.k=1",
        "tune.text_encoder=lora",
        "reward_dtype=bfloat16",
    )
    knobs = [line for line in done.err.splitlines() if line.startswith("  prompts.batch_size")]
    assert len(knobs) == 1
    monkeypatch.undo()
    # the advice is made of settings that exist
    card = train(tmp_path / "smaller", "chain.keep_activations=none", *knobs[0].split()[:2], "schedule=last_k", "schedule.k=1")
    assert card["status"] == "finished"


def test_advice_names_no_setting_that_is_used_already(folder):
    module = tc.TextCraftor(
        tc.Backbone.load(folder).tune("lora", rank=1), tc.RewardMix(breaks=Breaks(())), schedule=tc.LastK(1), steps=2
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = PromptData(PROMPTS, batch_size=1)
    said = memory_advice(MemoryError(), module, trainer, "bfloat16")
    assert not any(word in said for word in ("keep_activations=none (", "schedule.k", "batch_size=0", "reward_dtype=", "=lora"))
