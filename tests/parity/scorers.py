"""Runs in the scorers' environment: the publications' own code scores a folder of pictures, into scores.json.

    python scorers.py <folder with job.json>

Nothing of tc_lightning is imported here.
"""

import contextlib
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import torch


def prepare(bpe: Path) -> None:
    """Makes the packages importable: torchvision beside a CPU torch, hpsv2's missing word list, ImageReward without its trainer."""
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # a torchvision whose operators load defines them itself
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    root = Path(importlib.util.find_spec("hpsv2").submodule_search_locations[0])
    target = root / "src" / "open_clip" / bpe.name
    if not target.exists():
        shutil.copy(bpe, target)
    sys.modules["clip"] = types.ModuleType("clip")  # only named at the top of ImageReward's other scorers
    package = root.parent / "ImageReward"
    for name, path in (("ImageReward", package), ("ImageReward.models", package / "models")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module


def hpsv2(job: dict, pictures: list, prompts: list[str]) -> list[float]:
    """The hpsv2 package's own score function, given a small model in the place of ViT-H-14."""
    from hpsv2 import img_score
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.transform import image_transform

    config = job["open_clip"]
    model = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], output_dict=True)
    size = config["vision_cfg"]["image_size"]
    img_score.model_dict |= {"model": model, "preprocess_val": image_transform(size, False, resize_longest_max=True)}
    return [float(img_score.score(picture, prompt, cp=job["hpsv2"])[0]) for picture, prompt in zip(pictures, prompts, strict=True)]


def open_clip_model(path: str, config: dict):
    """A model of the open_clip package with a file's weights, and its preprocessing."""
    from open_clip.model import CLIP
    from open_clip.transform import image_transform

    quick = {"quick_gelu": config.get("quick_gelu", False)}
    model = CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], **quick).eval()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model, image_transform(config["vision_cfg"]["image_size"], is_train=False)


def clip(job: dict, pictures: list, prompts: list[str]) -> list[float]:
    """Cosine by the open_clip package."""
    import open_clip

    model, preprocess = open_clip_model(job["clip"], job["wide"])
    image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    return (image * model.encode_text(open_clip.tokenize(prompts), normalize=True)).sum(-1).tolist()


def aesthetic(job: dict, pictures: list, prompts: list[str]) -> list[float]:
    """OpenAI's ViT by the open_clip package (quick GELU), the head as the image-reward package writes it."""
    from ImageReward.models.AestheticScore import MLP

    model, preprocess = open_clip_model(job["openai"], job["quick"])
    head = MLP(768).eval()
    head.load_state_dict(torch.load(job["head"], map_location="cpu", weights_only=True))
    image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
    return head(torch.nn.functional.normalize(image)).squeeze(-1).tolist()


def pickscore(job: dict, pictures: list, prompts: list[str]) -> list[float]:
    """transformers' processor and model, called as the model card of PickScore does."""
    from transformers import CLIPModel, CLIPProcessor  # what the Auto classes resolve to; those stumble over timm 0.6

    processor, model = CLIPProcessor.from_pretrained(job["pickscore"]), CLIPModel.from_pretrained(job["pickscore"]).eval()
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        image = model.get_image_features(**processor(images=picture, **options))
        text = model.get_text_features(**processor(text=prompt, **options))
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        scores.append(float(model.logit_scale.exp() * (text @ image.T)[0, 0]))
    return scores


def imagereward(job: dict, pictures: list, prompts: list[str]) -> list[float]:
    """The image-reward package's own model and score, with a small ViT and a small word list in the places of BLIP's."""
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip, blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    config = job["med"]
    vit = {"patch_size": config["patch_size"], "embed_dim": config["vision_width"], "depth": config["vision_layers"]}
    vit["num_heads"] = config["vision_heads"]
    blip_pretrain.create_vit = lambda kind, size, *_: (VisionTransformer(img_size=size, **vit), config["vision_width"])
    published = blip.BertTokenizer
    blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda name: published.from_pretrained(job["bert"]))
    model = ImageReward(med_config=job["med_config"]).eval()
    loaded = model.load_state_dict(torch.load(job["imagereward"], weights_only=True), strict=False)
    assert not loaded.missing_keys, loaded
    return [model.score(prompt, picture) for picture, prompt in zip(pictures, prompts, strict=True)]


def tokens(prompts: list[str]) -> dict[str, list]:
    """Tokens by open_clip and by the hpsv2 package."""
    import open_clip
    from hpsv2.src.open_clip import tokenize

    return {"open_clip": open_clip.tokenize(prompts).tolist(), "hpsv2": tokenize(prompts).tolist()}


def main(folder: Path) -> None:
    """Reads job.json and the pictures, writes scores.json."""
    from PIL import Image

    job = json.loads((folder / "job.json").read_text())
    prepare(Path(job["bpe"]))
    found: dict = {"tokens": tokens(job["all_prompts"])}
    for which, names in job["pictures"].items():
        pictures = [Image.open(folder / name).convert("RGB") for name in names]
        with torch.no_grad():
            for scorer in (hpsv2, clip, aesthetic, pickscore, imagereward):
                found[f"{scorer.__name__}/{which}"] = scorer(job, pictures, job["prompts"])
    (folder / "scores.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
