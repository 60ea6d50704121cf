"""Gradients of each reward against finite differences in float64, and no sample sees its neighbours."""

import copy

import pytest
import torch
from reward_checkpoints import (
    MED,
    OPEN_CLIP,
    bert_tokenizer,
    captions,
    small_clip_folder,
    small_head,
    small_image_reward,
    small_open_clip,
    small_tokenizer,
)
from torch import nn

from tc_lightning.rewards import Aesthetic, CLIPScore, CLIPTunedScore, HPSv2, ImageReward, PickScore

NAMES = ["clip", "pickscore", "aesthetic", "hpsv2", "imagereward", "clip_tuned"]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    clip, tokenizer = small_clip_folder(folder / "clip"), small_tokenizer(folder / "tokenizer")
    head, reward = small_head(folder / "head.pth"), small_image_reward(folder / "ImageReward.pt")
    bert = bert_tokenizer(folder / "bert")

    def make(name, preprocess="scorer"):
        if name == "hpsv2":
            return HPSv2(small_open_clip(folder / "HPS.pt"), config=OPEN_CLIP, tokenizer=tokenizer, preprocess=preprocess)
        if name == "imagereward":
            return ImageReward(reward, config=MED, tokenizer=bert, preprocess=preprocess)
        if name == "aesthetic":
            return Aesthetic(head, clip=clip, preprocess=preprocess)
        if name == "clip_tuned":
            return CLIPTunedScore(clip, preprocess=preprocess).bind(text_encoder(clip))
        return {"clip": CLIPScore, "pickscore": PickScore}[name](clip, preprocess=preprocess)

    return make


def text_encoder(folder):
    """A live text encoder that begins as the CLIP's own, as Stable Diffusion's does."""
    from transformers import CLIPModel, CLIPTextModel

    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    encoder = CLIPTextModel(clip.config.text_config)
    own = encoder.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in own) else ""
    encoder.load_state_dict({prefix + name: value for name, value in clip.text_model.state_dict().items()})
    return encoder.eval()


@pytest.mark.parametrize("preprocess", ["scorer", "avgpool"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_against_finite_differences(name, preprocess, rewards):
    reward = rewards(name, preprocess).to(torch.float64)
    if name == "clip_tuned":
        reward._bound[0].to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(2, 3, 90, 70, generator=generator, dtype=torch.float64)  # far from the clamp
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64) * 1e-5
    prompts = captions(2)
    images.requires_grad_()
    scores = reward(images, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    with torch.no_grad():
        change = (reward(images + direction, prompts) - reward(images - direction, prompts)).sum() / 2
    assert scores.dtype == torch.float64
    assert float((gradient * direction).sum()) == pytest.approx(float(change), rel=1e-5)
    assert abs(float(change)) > 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_batch_permutes_the_scores(name, rewards):
    reward, images, prompts = rewards(name), torch.rand(5, 3, 60, 80), captions(5)
    order = [3, 0, 4, 1, 2]
    scores = reward(images, prompts).detach()
    permuted = reward(images[order], [prompts[index] for index in order]).detach()
    torch.testing.assert_close(permuted, scores[order], rtol=1e-5, atol=1e-5)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(5)]).detach()
    torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (20, 20), (33, 71), (200, 48)])
@pytest.mark.parametrize("name", NAMES)
def test_any_image_size(name, size, rewards):
    scores = rewards(name)(torch.rand(1, 3, *size), ["a red dog"])
    assert scores.shape == (1,) and bool(scores.isfinite())


def test_tuned_score_begins_as_the_clip_score_and_follows_the_live_encoder(rewards):
    frozen, tuned = rewards("clip"), rewards("clip_tuned")
    images, prompts = torch.rand(3, 3, 40, 40), captions(3)
    torch.testing.assert_close(tuned(images, prompts), frozen(images, prompts), rtol=1e-4, atol=1e-5)
    encoder = tuned._bound[0]
    before = tuned(images, prompts).detach()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(tuned(images, prompts), before)  # no embedding was kept


def test_tuned_score_has_a_gradient_on_both_sides_and_registers_nothing(rewards):
    tuned = rewards("clip_tuned")
    encoder, images = tuned._bound[0], torch.rand(2, 3, 40, 40, requires_grad=True)
    tuned(images, ["red dog", "cat"]).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert all(parameter.grad is None for parameter in tuned.parameters())
    assert not {id(p) for p in encoder.parameters()} & {id(p) for p in tuned.parameters()}

    holder = nn.Module()
    holder.text_encoder, holder.constraint = encoder, tuned
    copied = copy.deepcopy(holder)
    assert copied.constraint._bound[0] is copied.text_encoder  # a copy of the whole follows its own encoder


def test_tuned_score_refuses_an_encoder_without_its_projection(rewards):
    """Stable Diffusion 2.x: the text encoder is one layer shorter than its CLIP, so no projection fits its output."""
    from transformers import CLIPTextModel

    tuned = rewards("clip_tuned")
    config = copy.deepcopy(tuned.tower.clip.config.text_config)
    config.num_hidden_layers -= 1
    with pytest.raises(ValueError, match="Stable Diffusion 2.x"):
        tuned.bind(CLIPTextModel(config))


def test_tuned_score_must_be_bound(rewards, tmp_path):
    with pytest.raises(RuntimeError, match="bind"):
        CLIPTunedScore(small_clip_folder(tmp_path / "clip"))(torch.rand(1, 3, 32, 32), ["a"])


def test_tuned_score_is_bound_by_the_method_and_trains_the_text(rewards):
    """One training step with constraint=clip_tuned: the gradient of the constraint alone reaches the text encoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from tc_lightning import Backbone, LastK, RewardMix, TextCraftor
    from tc_lightning.rewards import FunctionReward

    constraint = rewards("clip_tuned")
    encoder, tokenizer = constraint._bound
    constraint._bound = None
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=32, attention_head_dim=4, **channels, **blocks)
    plain = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    backbone = Backbone(tokenizer, encoder, AutoencoderKL(sample_size=16, **channels, **plain), unet, DDIMScheduler())
    nothing = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), weight=0.0, differentiable=True)
    module = TextCraftor(backbone, RewardMix(nothing=nothing), constraint=constraint, schedule=LastK(1), steps=2)
    assert constraint._bound[0] is backbone.text_encoder
    loss = module.training_step({"prompts": ["a red dog", "cat"], "seeds": [0, 1]}, 0)
    loss.backward()
    assert all(p.grad is not None for p in backbone.text_encoder.parameters())
    assert not any(p.requires_grad for p in constraint.parameters())
    assert not any("constraint" in name for name, p in module.named_parameters() if p.requires_grad)
