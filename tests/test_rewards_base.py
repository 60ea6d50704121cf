"""What every reward promises: scores with a gradient, an epoch mean without one, frozen networks, clear refusals."""

import copy
import os
from statistics import mean

import pytest
import torch
import torch.multiprocessing as mp
from reward_checkpoints import captions, small_clip_folder, small_head
from torch import nn

from tc_lightning.rewards import Aesthetic, CLIPScore, FunctionReward, PickScore, Reward, RewardMix


class Redness(Reward):
    """Mean red minus mean green, from a layer with dropout that eval mode must silence."""

    def __init__(self, weight=1.0, name=None):
        super().__init__(weight, name)
        self.net = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 1, 1))

    def score(self, images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2)) + 0 * self.net(images).mean()


def png_size(images, prompts):
    return [float(len(prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return small_clip_folder(folder / "clip"), small_head(folder / "head.pth")


def test_scores_carry_a_gradient_and_the_epoch_mean_none():
    reward, images = Redness(), torch.rand(4, 3, 8, 8, requires_grad=True)
    scores = reward(images, ["a"] * 4)
    assert scores.shape == (4,) and scores.requires_grad
    assert not any(value.requires_grad for value in reward.metric_state.values())
    copy.deepcopy(reward)  # a graph kept anywhere would make this fail
    assert not reward.compute().requires_grad


@pytest.mark.parametrize("call", ["forward", "update"])
def test_epoch_mean_of_uneven_batches(call):
    reward, everything = Redness(), []
    for size in (1, 5, 2):
        images = torch.rand(size, 3, 4, 4)
        getattr(reward, call)(images, ["a"] * size)
        everything += (images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))).tolist()
    assert float(reward.compute()) == pytest.approx(mean(everything), abs=1e-6)
    assert reward.update_count == 3
    reward.reset()
    reward(torch.zeros(1, 3, 4, 4), ["a"])
    assert float(reward.compute()) == 0.0


def _rank(rank: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mix = RewardMix(length=FunctionReward(png_size))
    for size in ((3, 1), (2,))[rank]:  # uneven batches and an uneven number of them
        mix(torch.rand(size, 3, 4, 4), [("a" * (size + rank))] * size)
    queue.put((rank, float(mix.compute()["length"])))
    torch.distributed.destroy_process_group()


@pytest.mark.full
def test_epoch_mean_over_two_processes():
    context, port = mp.get_context("spawn"), 20000 + os.getpid() % 20000
    queue = context.Queue()
    workers = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(timeout=60)
    expected = mean([3.0] * 3 + [1.0] + [3.0] * 2)
    assert found == {0: pytest.approx(expected), 1: pytest.approx(expected)}


def test_networks_are_frozen_and_stay_in_eval(files):
    folder, head = files
    mix = RewardMix(clip=CLIPScore(folder), aesthetic=Aesthetic(head, clip=folder), red=Redness()).train()
    assert not any(parameter.requires_grad for parameter in mix.parameters())
    assert not any(module.training for reward in mix.rewards.values() for module in reward.modules())
    images = torch.rand(2, 3, 40, 40)
    assert torch.equal(mix(images, ["a", "b"])[0], mix(images, ["a", "b"])[0])


def test_mix_is_the_weighted_sum_and_logs_every_term(files):
    folder, head = files
    mix = RewardMix({"clip": CLIPScore(folder, weight=50)}, aesthetic=Aesthetic(head, clip=folder, weight=3), red=Redness(0.0))
    images = torch.rand(3, 3, 33, 47, requires_grad=True)
    total, scores = mix(images, captions(3))
    assert list(scores) == ["clip", "aesthetic", "red"] and all(value.shape == (3,) for value in scores.values())
    torch.testing.assert_close(total, 50 * scores["clip"] + 3 * scores["aesthetic"])
    total.sum().backward()
    assert images.grad.abs().sum() > 0
    assert {name: float(value) for name, value in mix.compute().items()} == {
        name: pytest.approx(float(value.detach().mean()), abs=1e-6) for name, value in scores.items()
    }
    mix.reset()
    assert all(reward.update_count == 0 for reward in mix.rewards.values())


def test_a_mix_gives_what_its_rewards_give_alone(files):
    folder, head = files
    mix = RewardMix(clip=CLIPScore(folder), pick=PickScore(folder, preprocess="avgpool"), aesthetic=Aesthetic(head, clip=folder))
    images, prompts = torch.rand(2, 3, 50, 40), captions(2)
    _, scores = mix(images, prompts)
    for name, reward in mix.rewards.items():
        assert torch.equal(scores[name], reward(images, prompts))


def test_rewards_of_one_checkpoint_share_the_tower(files):
    folder, head = files
    clip, pick, aesthetic = CLIPScore(folder), PickScore(folder), Aesthetic(head, clip=folder)
    assert clip.tower is pick.tower is aesthetic.tower
    passes = []
    hook = clip.tower.clip.vision_model.register_forward_hook(lambda *_: passes.append(1))
    RewardMix(clip=clip, aesthetic=aesthetic)(torch.rand(1, 3, 40, 60), ["a"])
    hook.remove()
    assert len(passes) == 1
    both = copy.deepcopy(RewardMix(clip=clip, pick=pick))
    assert both.rewards.clip.tower is both.rewards.pick.tower
    clip.to(torch.float64)
    assert CLIPScore(folder).tower is not clip.tower  # moved or cast: no longer what a new reward expects


def test_text_features_are_computed_once_a_prompt_and_bounded(files, monkeypatch):
    tower = CLIPScore(files[0], dtype="float64").tower
    monkeypatch.setattr("tc_lightning.rewards.towers.TEXT_CACHE_SIZE", 3)
    encoded = []
    monkeypatch.setattr(tower, "_encode", lambda prompts, old=tower._encode: encoded.extend(prompts) or old(prompts))
    first = tower.text_embeds(["a", "b", "a"])
    again = tower.text_embeds(["b", "a"])
    assert encoded == ["a", "b"] and torch.equal(first[:2].flip(0), again) and torch.equal(first[0], first[2])
    tower.text_embeds(["c", "d"])
    assert list(tower._cache) == ["a", "c", "d"]
    tower.to(torch.float32)
    assert not tower._cache


def test_text_features_do_not_depend_on_what_is_encoded_with_them():
    """A resumed run meets prompts in other company than an uninterrupted one; a last bit is a different run."""
    from tc_lightning.rewards.tiny import tiny_clip
    from tc_lightning.tiny.shapes import captions

    tower, prompts = tiny_clip().tower, captions(24, 0, "dev")
    alone = tower.text_embeds(prompts[:1])
    for company in (prompts[:2], prompts[4::-1], prompts[10:] + prompts[:1], prompts):
        tower._cache.clear()
        assert torch.equal(tower.text_embeds(company)[company.index(prompts[0])], alone[0])


def test_scored_in_inference_mode_first_then_with_a_gradient(files):
    """Lightning validates in inference mode; what is kept from there must serve training."""
    reward, images = CLIPScore(files[0], dtype="fp32"), torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.inference_mode():
        before = reward(images, ["a", "b"])
    after = reward(images, ["a", "b"])
    after.sum().backward()
    torch.testing.assert_close(before, after.detach())


def test_casts_leave_the_sum_the_head_and_the_preprocessing(files):
    folder, head = files
    mix = RewardMix(clip=CLIPScore(folder), aesthetic=Aesthetic(head, clip=folder))
    images = torch.rand(2, 3, 40, 40)
    exact = mix(images, ["a", "b"])[1]
    mix.to(torch.bfloat16)
    assert mix.rewards.clip.tower.clip.dtype == torch.bfloat16
    assert mix.rewards.clip.score_sum.dtype == torch.float32 and mix.rewards.clip.score_count.dtype == torch.int64
    assert all(value.dtype == torch.float32 for value in mix.rewards.aesthetic.head.parameters())
    again = mix(images, ["a", "b"])[1]
    assert all(value.dtype == torch.float32 for value in again.values())
    torch.testing.assert_close(again["clip"], exact["clip"], rtol=0, atol=0.05)
    one_place = RewardMix(clip=CLIPScore(folder), aesthetic=Aesthetic(head, clip=folder), dtype="bf16")
    assert one_place.rewards.aesthetic.tower.clip.dtype == torch.bfloat16


def test_autocast_does_not_change_a_score(files):
    reward, images = CLIPScore(files[0], dtype="float32"), torch.rand(2, 3, 40, 40)
    plain = reward(images, ["a", "b"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(images, ["a", "b"]), plain)
    assert reward(images.bfloat16(), ["a", "b"]).dtype == torch.float32


def test_states_and_cached_text_stay_out_of_state_dict(files):
    reward = CLIPScore(files[0])
    reward(torch.rand(1, 3, 32, 32), ["a"])
    assert all(name.startswith("tower.clip.") for name in reward.state_dict())


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 8, 8) * 2 - 1, ["a", "b"], r"\[0, 1\]"),
        (torch.rand(2, 3, 8, 8) * 255, ["a", "b"], r"\[0, 1\]"),
        (torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8), ["a", "b"], "divide bytes by 255"),
        (torch.rand(3, 8, 8), ["a"], r"\[B, 3, H, W\]"),
        (torch.rand(2, 4, 8, 8), ["a", "b"], r"\[B, 3, H, W\]"),
        ("picture.png", ["a"], r"\[B, 3, H, W\]"),
        (torch.rand(0, 3, 8, 8), [], "empty"),
        (torch.rand(2, 3, 8, 8), ["a"], "2 images but 1 prompts"),
        (torch.rand(2, 3, 8, 8), "ab", "list of strings"),
        (torch.rand(2, 3, 8, 8), ["a", None], "list of strings"),
    ],
)
def test_bad_input(images, prompts, message):
    for reward in (Redness(), RewardMix(red=Redness())):
        with pytest.raises(ValueError, match=message):
            reward(images, prompts)


def test_a_score_that_is_not_finite_names_reward_and_prompt():
    def broken(images, prompts):
        return torch.tensor([0.0, float("nan")])

    mix = RewardMix(red=Redness(), broken=broken)
    with pytest.raises(FloatingPointError, match="reward broken gave nan for the prompt 'second'"):
        mix(torch.rand(2, 3, 8, 8), ["first", "second"])
    assert int(mix.rewards.red.score_count) == 0  # nothing of the bad batch is counted
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="images are not finite.*second"):
        mix(images, ["first", "second"])


def test_a_score_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(\)"):
        FunctionReward(lambda images, prompts: images.mean())(torch.rand(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights(weight):
    with pytest.raises(ValueError, match="constraint"):
        Redness(weight)


def test_bad_mixes():
    with pytest.raises(ValueError, match="at least one reward"):
        RewardMix()
    for name in ("total", "a.b", "1st", "keys"):
        with pytest.raises(ValueError, match="cannot name a reward"):
            RewardMix({name: Redness()})
    with pytest.raises(ValueError, match="_target_"):
        RewardMix(hpsv2={"weight": 100})


def test_rewards_without_gradient():
    mix = RewardMix(red=Redness(), length=png_size)
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    _, scores = mix(images, ["a", "abc"])  # evaluation and DDPO take it
    assert scores["length"].tolist() == [1.0, 3.0] and not scores["length"].requires_grad
    with pytest.raises(ValueError, match="length has no gradient.*ddpo"):
        mix.require_differentiable()
    mix.rewards["length"].weight = 0.0
    mix.require_differentiable()  # only logged
    differentiable = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), differentiable=True)
    assert differentiable(images, ["a", "b"]).requires_grad
    RewardMix(mean=differentiable).require_differentiable()


def test_a_function_by_its_path():
    reward = FunctionReward("statistics.mean", name="x")
    assert reward.function is mean
    with pytest.raises(ValueError, match="no function at 'nothing.here'"):
        FunctionReward("nothing.here")


def test_all_pairs_only_when_asked(files):
    images, prompts = torch.rand(5, 3, 32, 32), captions(5)
    paired, all_pairs = PickScore(files[0]), PickScore(files[0], all_pairs=True)
    tower = paired.tower
    similarity = tower.logit_scale * tower.image_embeds(images, "crop_down") @ tower.text_embeds(prompts).T
    torch.testing.assert_close(paired(images, prompts), similarity.diagonal())
    torch.testing.assert_close(all_pairs(images, prompts)[:4], similarity[:4, :4].mean(1))
    torch.testing.assert_close(all_pairs(images, prompts)[4], similarity[4, 4])
