"""Makes the embedded model and its rewards again from nothing: every stage resumes, and ends with its quality figure."""

from __future__ import annotations

from tc_lightning.pretrain.stage import Workshop

# What the shipped files reach; a stage that misses its gate is said aloud. (stage, figure, lowest, highest)
GATES = (
    ("vae", "renders_strict", 0.99, 1.0),
    ("clip", "right_caption", 0.95, 1.0),
    ("unet", "strict", 0.40, 0.60),
    ("unet", "failures_of_alignment", 0.80, 1.0),
    ("decoder", "reconstructions_strict", 0.95, 1.0),
    ("aesthetic", "correlation", 0.90, 1.0),
)


def pretrain(shop: Workshop) -> dict[str, dict[str, float]]:
    """Run the stages that are not done yet, in order; returns every stage's figures.

    The folder becomes a diffusers folder (tokenizer, text_encoder, vae, unet, scheduler) with clip/, preference/,
    aesthetic.pth and tuned/ beside it.
    """
    from tc_lightning.pretrain.aesthetic import train_aesthetic
    from tc_lightning.pretrain.clip import train_clip
    from tc_lightning.pretrain.preference import train_preference
    from tc_lightning.pretrain.tuned import train_tuned
    from tc_lightning.pretrain.unet import train_unet
    from tc_lightning.pretrain.vae import train_decoder, train_vae
    from tc_lightning.tiny.model import make_tokenizer, write_index

    tokenizer = make_tokenizer(shop.folder / "tokenizer")
    write_index(shop.folder)
    stages = {
        "vae": train_vae,
        "decoder": train_decoder,
        "clip": lambda shop: train_clip(shop, tokenizer),
        "unet": lambda shop: train_unet(shop, tokenizer),
        "preference": lambda shop: train_preference(shop, tokenizer),
        "aesthetic": train_aesthetic,
        "tuned": train_tuned,
    }
    if not (shop.folder / "tuned").is_dir():  # to make these anew, delete them
        shop.quality.pop("tuned", None)
    for name, train in stages.items():
        if not shop.done(name):
            train(shop)
    for message in missed(shop.quality):
        shop.say(message)
    return shop.quality


def missed(quality: dict[str, dict[str, float]]) -> list[str]:
    """A line for each gate that the figures miss."""
    lines = [
        f"gate missed: {stage} {figure} is {quality[stage][figure]}, wanted {low} to {high}"
        for stage, figure, low, high in GATES
        if stage in quality and not low <= quality[stage][figure] <= high
    ]
    preference = quality.get("preference")
    if preference and preference["pair_accuracy_preference"] <= preference["pair_accuracy_clip"]:
        lines.append("gate missed: the preference model orders pairs no better than the plain CLIP")
    return lines
