"""Each reward against the published scorer's arithmetic: on the same pixels, and from the picture on."""

from functools import cache

import pytest
import torch
from reward_checkpoints import (
    MED,
    OPEN_CLIP,
    as_images,
    bert_tokenizer,
    captions,
    pictures,
    shared_data,
    small_clip_folder,
    small_head,
    small_image_reward,
    small_open_clip,
    small_tokenizer,
)
from reward_references import MEAN, STD, image_reward, linear_head, open_clip_image, open_clip_text, pil_pixels

from tc_lightning.rewards import Aesthetic, CLIPScore, HPSv2, ImageReward, PickScore
from tc_lightning.rewards.checkpoints import read_state_dict
from tc_lightning.rewards.imagereward import MEAN as REWARD_MEAN
from tc_lightning.rewards.imagereward import STD as REWARD_STD

PIXEL_TOLERANCE = 1e-4  # relative, same pixels
EACH, MEAN_OF_ALL = 2e-3, 5e-4  # in cosine, from the picture on


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return {
        "tokenizer": small_tokenizer(folder / "tokenizer"),
        "open_clip": small_open_clip(folder / "HPS.pt"),
        "clip": small_clip_folder(folder / "clip", half=True),
        "head": small_head(folder / "head.pth"),
        "reward": small_image_reward(folder / "ImageReward.pt"),
        "bert": bert_tokenizer(folder / "bert"),
    }


@cache
def clip_parts(folder):
    from transformers import AutoTokenizer, CLIPModel

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def clip_reference(folder, pixels, prompt):
    """transformers' own CLIPModel: unit image and text embedding, and the temperature."""
    clip, tokenizer = clip_parts(folder)
    tokens = tokenizer([prompt], truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        image = clip.get_image_features(pixel_values=pixels).pooler_output
        text = clip.get_text_features(**tokens).pooler_output
    return image / image.norm(dim=-1), text / text.norm(dim=-1), clip.logit_scale.exp()


def build(name, files):
    """A reward on its small checkpoint; its reference (normalised pixels, prompt) -> score; image size, fit, unit in cosine."""
    if name == "hpsv2":
        reward = HPSv2(files["open_clip"], config=OPEN_CLIP, tokenizer=files["tokenizer"])
        state = read_state_dict(files["open_clip"])

        def reference(pixels, prompt):
            text = open_clip_text(state, OPEN_CLIP, reward.tower.tokenize([prompt]))
            return (open_clip_image(state, OPEN_CLIP, pixels) @ text.T).squeeze()

        return reward, reference, 64, "pad", 1.0
    if name == "imagereward":
        reward = ImageReward(files["reward"], config=MED, tokenizer=files["bert"])
        state = read_state_dict(files["reward"])

        def reference(pixels, prompt):
            tokens = reward.tokenizer([prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
            raw = image_reward(state, MED, pixels, tokens.input_ids, tokens.attention_mask)
            return ((raw - REWARD_MEAN) / REWARD_STD).squeeze()

        return reward, reference, 64, "crop", 1.0
    if name == "aesthetic":
        reward, head = Aesthetic(files["head"], clip=files["clip"]), read_state_dict(files["head"])
        return reward, lambda x, p: linear_head(head, clip_reference(files["clip"], x, p)[0]).squeeze(), 32, "crop", 1.0
    kind, fit = (PickScore, "crop_down") if name == "pickscore" else (CLIPScore, "crop")

    def reference(pixels, prompt):
        image, text, scale = clip_reference(files["clip"], pixels, prompt)
        return (image @ text.T).squeeze() * (scale if name == "pickscore" else 1.0)

    return kind(files["clip"]), reference, 32, fit, 100.0 if name == "pickscore" else 1.0


COSINES = ["clip", "pickscore", "hpsv2"]
NAMES = [*COSINES, "aesthetic", "imagereward"]


@pytest.mark.parametrize("name", NAMES)
def test_same_pixels(name, files):
    """Images that already have the tower's size: only the network and the text are compared."""
    reward, reference, size, _, _ = build(name, files)
    images, prompts = torch.rand(20, 3, size, size, generator=torch.Generator().manual_seed(1)), captions()
    expected = torch.stack([reference(((x - MEAN) / STD)[None], p) for x, p in zip(images, prompts, strict=True)])
    scores = reward(images, prompts).detach()
    expected = expected.detach()
    torch.testing.assert_close(scores, expected, rtol=PIXEL_TOLERANCE, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_from_the_picture_on(name, files):
    """PIL's 8-bit preprocessing against ours: 20 pictures, square, portrait, landscape, smaller and larger than the tower."""
    reward, reference, size, fit, unit = build(name, files)
    prompts = captions()
    with torch.no_grad():
        ours = torch.cat([reward(as_images(picture), [p]) for picture, p in zip(pictures(), prompts, strict=True)]) / unit
        pixels = [pil_pixels(picture, size, fit) for picture in pictures()]
        theirs = torch.stack([reference(x, p) / unit for x, p in zip(pixels, prompts, strict=True)])
        swapped = reward(as_images(pictures(1)[0]), [prompts[1]]) / unit
    spread, difference = float(theirs.std()), ours - theirs
    # cosines have an absolute tolerance; a head's scores have their own scale: a twentieth of their spread
    each, mean = (EACH, MEAN_OF_ALL) if name in COSINES else (spread / 20, spread / 80)
    print(f"{name}: spread {spread:.4f}, largest {float(difference.abs().max()):.2e}, mean {float(difference.mean()):.2e}")
    assert spread >= 20 * each
    assert float(difference.abs().max()) <= each
    assert abs(float(difference.mean())) <= mean
    if name == "aesthetic":
        assert float(swapped) == float(ours[0])
    else:
        assert abs(float(swapped - ours[0])) > each


def test_real_aesthetic_head(tmp_path):
    """The published head's file loads, and scores as the product of its five matrices says."""
    path = shared_data("sac+logos+ava1-l14-linearMSE.pth")
    from tc_lightning.rewards.aesthetic import SHA256

    reward = Aesthetic(path, clip=small_clip_folder(tmp_path / "clip", embed=768), sha256=SHA256)
    embeds = torch.nn.functional.normalize(torch.randn(8, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(reward.head(embeds), linear_head(read_state_dict(path), embeds), rtol=1e-5, atol=1e-5)
    scores = reward(torch.rand(2, 3, 40, 60), ["a", "b"])
    assert scores.shape == (2,) and bool(scores.isfinite().all())
