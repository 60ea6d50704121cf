"""Resizing against PIL, PNG files and grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from tc_lightning import pixels


def picture(height, width):
    """A smooth picture with some sharp edges, [1, 3, height, width], already rounded to bytes."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([(17 * x + 5 * y).sin(), (23 * y * x).cos(), (40 * (x - 0.5) ** 2 + 9 * y).sin()])
    disc = ((x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.05).float()
    image = (0.5 + 0.5 * waves) * (1 - disc) + torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1) * disc
    return (image[None] * 255).round() / 255


def psnr(a, b):
    return -10 * float((a - b).pow(2).mean().log10())


def pil_resize(image, size, method):
    resized = Image.fromarray(pixels.to_uint8(image)[0]).resize((size[1], size[0]), method)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("source, size", [((512, 512), (224, 224)), ((32, 32), (224, 224)), ((97, 160), (64, 50))])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_pil(source, size, mode):
    image = picture(*source)
    assert psnr(pixels.resize(image, size, mode), pil_resize(image, size, Image.Resampling[mode.upper()])) >= 50


def test_average_is_adaptive_pooling():
    image = picture(64, 64)
    torch.testing.assert_close(pixels.resize(image, 16, "average"), torch.nn.functional.avg_pool2d(image, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_resize_under_autocast_is_fp32_with_gradient(dtype):
    image = picture(64, 48).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        resized = pixels.resize(image, (24, 32))
    assert resized.dtype == torch.float32 and resized.shape == (1, 3, 24, 32)
    torch.testing.assert_close(resized, pixels.resize(image.float(), (24, 32)))
    resized.sum().backward()
    assert image.grad.dtype == dtype and image.grad.abs().sum() > 0


def test_clamp_stops_gradient_on_overshooting_pixels_only():
    image = (torch.arange(32) >= 16).float().expand(1, 3, 32, 32).clone().requires_grad_()
    free = pixels.resize(image, 64, clamp=False)
    inside = (free >= 0) & (free <= 1)
    clamped = pixels.resize(image, 64)
    assert not inside.all() and clamped.min() == 0 and clamped.max() == 1
    (expected,) = torch.autograd.grad(free, image, inside.float())
    (gradient,) = torch.autograd.grad(clamped, image, torch.ones_like(clamped))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("source, short, padded", [((60, 90), (20, 30), (13, 20)), ((90, 61), (29, 20), (20, 14))])
def test_sides_and_padding(source, short, padded):
    image = picture(*source) * 0.5 + 0.25
    assert pixels.resize_short_side(image, 20).shape[-2:] == short
    square = pixels.resize_longest_side_and_pad(image, 20, pad_value=0.0)
    assert square.shape == (1, 3, 20, 20)
    filled = (square > 0).all(1)[0]
    assert (int(filled.any(1).sum()), int(filled.any(0).sum())) == padded
    torch.testing.assert_close(pixels.center_crop(square, padded), pixels.resize(image, padded))


def test_short_side_and_crop_match_clips_image_processor():
    from transformers.models.clip import image_processing_pil_clip as clip

    image = picture(300, 200)
    processor = clip.CLIPImageProcessorPil()
    reference = processor(Image.fromarray(pixels.to_uint8(image)[0]), return_tensors="pt")["pixel_values"]
    ours = pixels.normalize(pixels.center_crop(pixels.resize_short_side(image, 224), 224))
    assert ours.shape == reference.shape and (ours - reference).abs().mean() < 0.01


def test_png_round_trip(tmp_path):
    images = torch.cat([picture(16, 24), 1 - picture(16, 24)])
    paths = pixels.save_png(images, tmp_path / "new", ["a", "sub/b.png"])
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["new/a.png", "new/sub/b.png"]
    torch.testing.assert_close(torch.stack([pixels.load_png(path) for path in paths]), images)


def test_to_uint8_clips_and_rounds():
    images = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert pixels.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_grid_holds_every_pixel_and_no_text_touches_an_image():
    rows = torch.stack([picture(32, 32).repeat(3, 1, 1, 1) * (r + 1) / 2 for r in range(2)])
    labels = ["a very long prompt " * 12, "extraordinarilylongwordwithoutanyspace" * 2]
    sheet = pixels.grid(rows, labels, ["first", "second " * 8, "third"], [["score 1.234 " * 4, "b", "c"]] * 2)
    found, cell = np.array(sheet), np.array(Image.fromarray(pixels.to_uint8(rows[1])[0]).resize((160, 160), 0))
    windows = np.lib.stride_tricks.sliding_window_view(found[..., 0], (160, 160))
    corner = np.argwhere((windows[..., 0, 0] == cell[0, 0, 0]) & (windows[..., 80, 80] == cell[80, 80, 0]))
    matches = [tuple(at) for at in corner if np.array_equal(found[at[0] :, at[1] :][:160, :160], cell)]
    assert len(matches) == 3


def test_grid_default_scale_and_bare_grid():
    assert pixels.grid(torch.zeros(1, 2, 3, 32, 32)).width == 12 + 2 * (160 + 12)
    assert pixels.grid(torch.zeros(1, 2, 3, 300, 300)).width == 12 + 2 * (300 + 12)
    assert pixels.grid(torch.zeros(1, 2, 3, 32, 32), scale=2).width == 12 + 2 * (64 + 12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pixels.resize(picture(8, 8), 4, "nearest"), "mode='nearest', accepted: bicubic"),
        (lambda: pixels.center_crop(picture(8, 8), 9), "crop of 9x9"),
        (lambda: pixels.save_png(picture(8, 8), ".", []), "0 names for 1 images"),
        (lambda: pixels.grid(torch.zeros(1, 2, 3, 8, 8), ["a", "b"]), "2 row_labels, accepted: 1"),
        (lambda: pixels.grid(torch.zeros(1, 2, 3, 8, 8), cell_labels=[["a"]]), "accepted: 1 lists of 2"),
        (lambda: pixels.grid(torch.zeros(1, 2, 3, 8, 8), scale=0), "scale=0"),
    ],
)
def test_errors_say_what_is_accepted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
