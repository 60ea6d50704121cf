"""Direct fine-tuning: one prediction by hand, what gets gradient; its data from folders, tars, hub sets and the renderer."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from small_runs import SMALL, door, refused, small_pipeline, train

import tc_lightning as tc
from tc_lightning.noise import derive_seed, gaussian
from tc_lightning.pairs import drawn_pairs, folder_pairs, hub_pairs, webdataset_pairs
from tc_lightning.prompts import PromptData
from tc_lightning.rewards.base import FunctionReward
from tc_lightning.tiny.oracle import judge
from tc_lightning.tiny.shapes import captions, draw_caption
from tc_lightning.trainable import gradient_report, trainable_names

PROMPTS = ["a red circle", "a blue cross on the left"]


def bright(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place)
    return place


@pytest.fixture
def make(folder):
    def build(text_encoder="full", unet="frozen", differentiable=True):
        backbone = tc.Backbone.load(folder).tune(text_encoder, unet, rank=2)
        module = tc.Direct(backbone, tc.RewardMix(bright=FunctionReward(bright, differentiable=differentiable)), guidance_scale=3.0)
        module.log = module.log_dict = lambda *args, **kwargs: None
        return module

    return build


def batch():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"prompts": PROMPTS, "seeds": [3, 4], "images": images}


def png(colour=(255, 0, 0), size=(20, 10)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = tarfile.SYMTYPE, data
                archive.addfile(info)
    return path


def test_a_prediction_by_hand(make):
    """Eq. 4 of a real image noised to a t of its own, in one guided call; diffusers does the noising."""
    module, given = make(), batch()
    found = module.predict_x0(given["images"], PROMPTS, [3, 4])
    backbone = module.backbone
    scheduler, vae = backbone.noise_scheduler, backbone.vae
    for row in range(2):
        seed = given["seeds"][row]
        t = torch.tensor([derive_seed(seed, 31) % 1000])
        with torch.no_grad():
            latents = vae.encode(2 * given["images"][row : row + 1] - 1).latent_dist.mode() * vae.config.scaling_factor
            noised = scheduler.add_noise(latents, gaussian([seed], (4, 8, 8)), t)
            null, cond = (backbone.encode([text]) for text in ("", PROMPTS[row]))
            empty, told = (backbone.unet(noised, t, embeds).sample for embeds in (null, cond))
            alpha_bar = scheduler.alphas_cumprod[t]
            noise_pred = empty + 3.0 * (told - empty)
            expected = (noised - (1 - alpha_bar).sqrt() * noise_pred) / alpha_bar.sqrt()
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert derive_seed(3, 31) % 1000 != derive_seed(4, 31) % 1000


@pytest.mark.parametrize("modes", [("full", "frozen"), ("lora", "full")], ids="-".join)
def test_gradient_on_exactly_what_learns(modes, make):
    module = make(*modes)
    module.training_step(batch(), 0).backward()
    report = gradient_report(module)
    assert report["leaked"] == [] and report["without"] == [] and report["with"] == trainable_names(module)


def test_refusals(make):
    with pytest.raises(ValueError, match="method=direct learns from images with captions"):
        make().training_step({"prompts": PROMPTS, "seeds": [1, 2]}, 0)
    with pytest.raises(ValueError, match="bright has no gradient"):
        make(differentiable=False)
    with pytest.raises(ValueError, match="these prompts have none: prompts=image_folder"):
        PromptData(PROMPTS).require_images(8)


def test_drawings_show_what_their_captions_say():
    texts = captions(100, 5, "train") + captions(100, 6, "train", forget=0.5)
    images = torch.stack([draw_caption(text, seed) for seed, text in enumerate(texts)])
    assert judge(images, texts).tolist() == [1.0] * 200
    assert torch.equal(draw_caption(texts[0], 3), draw_caption(texts[0], 3))
    pairs = drawn_pairs(texts[:2])
    assert torch.equal(pairs.load(1, 32), pairs.load(1, 32)) and pairs.load(0, 16).shape == (3, 16, 16)


def test_images_come_with_their_prompts(tmp_path):
    """In any order, over epochs and workers, a prompt's image is its own."""
    for index in range(8):
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / f"{index}.png").write_bytes(png((20 * index, 0, 0)))
        (tmp_path / "deep" / f"{index}.txt").write_text(f"a caption number {index}\n")
    (tmp_path / "without_caption.png").write_bytes(png())
    for workers in (0, 2):
        data = PromptData.image_folder(tmp_path, dev=1, heldout=1, batch_size=2, workers=workers)
        assert "images" not in next(iter(data.train_dataloader()))
        data.require_images(4)
        rows = [pair for batch in data.train_dataloader() for pair in zip(batch["prompts"], batch["images"], strict=True)]
        assert len(rows) == 6
        for prompt, image in rows:
            assert image.shape == (3, 4, 4) and image[0].mean().item() == pytest.approx(20 * int(prompt[-1]) / 255, abs=0.01)


def test_a_picture_is_cut_to_its_central_square(tmp_path):
    picture = Image.new("RGB", (30, 10), (0, 0, 0))
    picture.paste((255, 255, 255), (10, 0, 20, 10))
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("white in the middle")
    image = folder_pairs(tmp_path).load(0, 5)
    assert image.shape == (3, 5, 5) and image.min() > 0.9


def test_webdataset_tars_are_read_in_place(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            ("a/000.png", png((255, 0, 0))),
            ("a/000.txt", b"red"),
            ("001.json", json.dumps({"caption": "green", "width": 3}).encode()),
            ("001.jpg", png((0, 255, 0))),
            ("002.png", png()),
            ("link.png", "/etc/passwd"),
            ("link.txt", b"a link is no image"),
            ("../up.png", png((0, 0, 255))),
            ("../up.txt", b"blue"),
        ],
    )
    pairs = webdataset_pairs(tmp_path)
    assert pairs.captions == ["red", "green", "blue"]
    means = [pairs.load(index, 4).mean((1, 2)).tolist() for index in range(3)]
    assert means == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert sorted(file.name for file in tmp_path.parent.rglob("*.png") if file.is_relative_to(tmp_path)) == []
    data = PromptData.webdataset(str(tmp_path / "0.tar"), dev=0, heldout=0, batch_size=1)
    data.require_images(4)
    assert len(list(data.train_dataloader())) == 3


def test_bad_files_are_one_clear_error(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(png()[:40])
    (tmp_path / "broken" / "a.txt").write_text("cut short")
    with pytest.raises(ValueError, match="could not read the image .*a.png"):
        folder_pairs(tmp_path / "broken").load(0, 4)
    (tmp_path / "broken" / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        folder_pairs(tmp_path / "broken")
    (tmp_path / "broken" / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="a.txt is an empty caption"):
        folder_pairs(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        folder_pairs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds 0 images"):
        folder_pairs(tmp_path / "empty")
    (tmp_path / "no.tar").write_bytes(b"this is no tar")
    with pytest.raises(ValueError, match="could not read .*no.tar as an uncompressed tar"):
        webdataset_pairs(tmp_path / "no.tar")
    with pytest.raises(FileNotFoundError, match="no tar at"):
        webdataset_pairs(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds? no image with a caption"):
        webdataset_pairs(write_tar(tmp_path / "images.tar", [("a.png", png())]))
    with pytest.raises(ValueError, match="b.json is not JSON"):
        webdataset_pairs(write_tar(tmp_path / "json.tar", [("b.json", b"{"), ("b.png", png())]))


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tc_lightning.pairs.MAX_PIXELS", 100)
    (tmp_path / "a.png").write_bytes(png(size=(20, 10)))
    (tmp_path / "a.txt").write_text("large")
    with pytest.raises(ValueError, match="has 20 x 10 pixels, accepted: at most 100"):
        folder_pairs(tmp_path).load(0, 4)


def test_hub_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (9, 7), (0, 255, 0))] * 3, "text": ["one", "two", "three"]})
    table.to_parquet(tmp_path / "set.parquet")
    pairs = hub_pairs("parquet", data_files=str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    assert pairs.captions == ["one", "two", "three"] and pairs.load(2, 4).mean((1, 2)).tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="has no column 'caption': it has image, text"):
        hub_pairs("parquet", caption="caption", data_files=str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))


def test_without_datasets_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tc_lightning\[data\]'"):
        hub_pairs("some/set")


def test_the_door_refuses_prompts_without_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle number {i}" for i in range(20)))
    options = ("method=direct", "prompts=file", f"prompts.path={tmp_path / 'prompts.txt'}", f"hydra.run.dir={tmp_path / 'run'}")
    small = [word for word in SMALL if not word.startswith("prompts.train")]
    refused(door("train", *small, *options), "method=direct learns from images with captions", "prompts=image_folder")


@pytest.mark.full
def test_two_steps_are_one_and_one(tmp_path):
    options = ("method=direct", "val.every=100", "checkpoint_every=1", "prompts.heldout=2")
    whole = train(tmp_path / "whole", *options, "max_steps=2")
    train(tmp_path / "parts", *options, "max_steps=1")
    parts = train(tmp_path / "parts", *options, "max_steps=2", "ckpt_path=last")
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"])
    assert whole["metrics"] == parts["metrics"] and whole["unet"] == {"forwards": 2, "backwards": 2}
