"""Small random checkpoints in the published file layouts; the same seed gives the same file."""

import gzip
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

SHARED_DATA = Path(os.environ.get("TC_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 8, "patch_size": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 32, "vocab_size": 520, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2.0},
}
MED = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "vision_heads": 4,
    "vision_width": 32,
    "vision_layers": 2,
    "image_size": 64,
    "patch_size": 16,
}


def shared_data(name: str) -> Path:
    """A file of the shared data folder; the test is skipped where it is absent."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in {SHARED_DATA} (TC_SHARED_DATA names the folder)")
    return path


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in CLIP's vocabulary, in its order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in kept] + [chr(256 + index) for index in range(256 - len(kept))]


def clip_tokenizer(folder: Path, merges: list[tuple[str, str]], max_length: int) -> Path:
    """A CLIPTokenizer of bytes, merges and the two special tokens, in CLIP's order."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length).save_pretrained(folder)
    return folder


def small_tokenizer(folder: Path, max_length: int = 32) -> Path:
    """520 tokens: "red", "dog" and "cat" are words, all else is spelt."""
    merges = [("e", "d</w>"), ("r", "ed</w>"), ("d", "o"), ("do", "g</w>"), ("c", "a"), ("ca", "t</w>")]
    return clip_tokenizer(folder, merges, max_length)


def full_tokenizer(folder: Path) -> Path:
    """CLIP's own 49408 tokens, from its list of merges in the shared data."""
    lines = gzip.decompress(shared_data("bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    return clip_tokenizer(folder, [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]], 77)


def bert_tokenizer(folder: Path) -> Path:
    """A small BertTokenizer: letters, their continuations and some words, with ImageReward's places for two more tokens."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = "the red blue green dog cat circle square star left right small big of on in with and photo painting".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, model_max_length=512).save_pretrained(folder)
    return folder


def fill(shapes: dict[str, tuple[int, ...]], seed: int, gain: float = 1.5) -> dict[str, Tensor]:
    """Random weights by name and shape, large enough that images and prompts score differently."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        norm = any(part in name.lower() for part in ("norm", "ln_"))
        if name == "logit_scale":
            state[name] = torch.tensor(math.log(100.0))
        elif norm:
            state[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            state[name] = 0.1 * noise
        elif "embed" in name and "patch" not in name or name.endswith(("cls_token", "class_embedding")):
            state[name] = noise
        elif name in ("visual.proj", "text_projection"):
            state[name] = gain * noise / math.sqrt(shape[0])
        else:
            state[name] = gain * noise / math.sqrt(math.prod(shape[1:]))
    return state


def open_clip_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of open_clip's CLIP."""
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch = vision["width"], vision["patch_size"]
    shapes = {
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embed),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        **_norm("visual.ln_pre", width),
        **_norm("visual.ln_post", width),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        **_norm("ln_final", text["width"]),
    }
    for prefix, part in (("visual.transformer", vision), ("transformer", text)):
        wide = part["width"]
        for index in range(part["layers"]):
            block = f"{prefix}.resblocks.{index}"
            shapes |= {**_norm(f"{block}.ln_1", wide), **_norm(f"{block}.ln_2", wide)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * wide, wide), f"{block}.attn.in_proj_bias": (3 * wide,)}
            hidden = int(wide * part.get("mlp_ratio", 4.0))
            for name, (wide_in, wide_out) in {
                "attn.out_proj": (wide, wide),
                "mlp.c_fc": (wide, hidden),
                "mlp.c_proj": (hidden, wide),
            }.items():
                shapes |= _linear(f"{block}.{name}", wide_in, wide_out)
    return shapes


def small_open_clip(path: Path, seed: int = 0, config: dict = OPEN_CLIP) -> Path:
    """A file in HPSv2's layout: open_clip's names under the key state_dict."""
    torch.save({"epoch": 3, "state_dict": fill(open_clip_shapes(config), seed)}, path)
    return path


def small_clip_folder(folder: Path, seed: int = 0, half: bool = False, embed: int = 24) -> Path:
    """A transformers CLIPModel with its tokenizer: image 32, patch 8."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = small_tokenizer(folder)
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": embed,
    }
    text = {"vocab_size": vocabulary, "max_position_embeddings": 32, "pad_token_id": vocabulary - 1}
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**tower, **text, **ends},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=embed,
        )
    )
    clip.load_state_dict(fill({name: tuple(value.shape) for name, value in clip.state_dict().items()}, seed))
    (clip.half() if half else clip).save_pretrained(folder)
    return folder


def head_shapes(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LAION's head and ImageReward's."""
    shapes = {}
    for index, (wide_in, wide_out) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        shapes |= _linear(f"layers.{index}", wide_in, wide_out)
    return shapes


def small_head(path: Path, widths: tuple[int, ...] = (24, 16, 8, 8, 4, 1), seed: int = 0) -> Path:
    """A head file in the layout of LAION's aesthetic predictor."""
    torch.save(fill(head_shapes(widths), seed), path)
    return path


def image_reward_shapes(config: dict = MED, head: tuple[int, ...] = (1024, 128, 64, 16, 1)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward.pt."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    wide, hidden, patch = config["vision_width"], config["hidden_size"], config["patch_size"]
    shapes = {
        f"{vision}.cls_token": (1, 1, wide),
        f"{vision}.pos_embed": (1, (config["image_size"] // patch) ** 2 + 1, wide),
        f"{vision}.patch_embed.proj.weight": (wide, 3, patch, patch),
        f"{vision}.patch_embed.proj.bias": (wide,),
        **_norm(f"{vision}.norm", wide),
        f"{text}.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        f"{text}.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        **_norm(f"{text}.embeddings.LayerNorm", hidden),
        **_linear("blip.vision_proj", wide, 256),
        **_linear("blip.text_proj", hidden, 256),
        **{f"mlp.{name}": shape for name, shape in head_shapes((hidden, *head)).items()},
    }
    for index in range(config["vision_layers"]):
        block = f"{vision}.blocks.{index}"
        shapes |= {**_norm(f"{block}.norm1", wide), **_norm(f"{block}.norm2", wide)}
        shapes |= {**_linear(f"{block}.attn.qkv", wide, 3 * wide), **_linear(f"{block}.attn.proj", wide, wide)}
        shapes |= {**_linear(f"{block}.mlp.fc1", wide, 4 * wide), **_linear(f"{block}.mlp.fc2", 4 * wide, wide)}
    for index in range(config["num_hidden_layers"]):
        shapes |= _bert_layer(f"{text}.encoder.layer.{index}", hidden, config["intermediate_size"], wide)
    return shapes


def _bert_layer(layer: str, hidden: int, intermediate: int, image: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for kind, source in (("attention", hidden), ("crossattention", image)):
        shapes |= _linear(f"{layer}.{kind}.self.query", hidden, hidden)
        shapes |= {**_linear(f"{layer}.{kind}.self.key", source, hidden), **_linear(f"{layer}.{kind}.self.value", source, hidden)}
        shapes |= {**_linear(f"{layer}.{kind}.output.dense", hidden, hidden), **_norm(f"{layer}.{kind}.output.LayerNorm", hidden)}
    shapes |= {**_linear(f"{layer}.intermediate.dense", hidden, intermediate), **_norm(f"{layer}.output.LayerNorm", hidden)}
    return shapes | _linear(f"{layer}.output.dense", intermediate, hidden)


def small_image_reward(path: Path, seed: int = 0, config: dict = MED, head: tuple[int, ...] = (16, 8, 8, 4, 1)) -> Path:
    """A file in the layout of ImageReward.pt."""
    state = fill(image_reward_shapes(config, head), seed)
    length = config["max_position_embeddings"]
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(length).expand(1, -1).clone()
    torch.save(state, path)
    return path


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, wide_in: int, wide_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (wide_out, wide_in), f"{name}.bias": (wide_out,)}


def pictures(count: int = 20, seed: int = 0) -> list:
    """Varied PIL pictures of different sizes: square, portrait, landscape; smooth ground, sharp shapes, some grain."""
    import numpy as np
    from PIL import Image, ImageDraw

    sizes = [(512, 512), (512, 768), (768, 512), (333, 500), (641, 480), (100, 60), (225, 224), (256, 1000), (1024, 1024), (64, 64)]
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        width, height = sizes[index % len(sizes)]
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        phase, ground = random.uniform(0, 6, 3), random.uniform(0, 255, 3)
        waves = [np.sin(random.uniform(1, 9) * x + random.uniform(1, 9) * y + shift) for shift in phase]
        pixels = np.stack(waves, -1) * random.uniform(10, 90) + ground + random.normal(0, 6, (height, width, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(random.integers(1, 6)):
            corner = random.uniform(0, 0.7, 2)
            box = [corner[0] * width, corner[1] * height, (corner[0] + 0.3) * width, (corner[1] + 0.3) * height]
            colour = tuple(int(value) for value in random.integers(0, 256, 3))
            (draw.ellipse if random.random() < 0.5 else draw.rectangle)(box, fill=colour)
        made.append(picture)
    return made


def as_images(picture) -> Tensor:
    """[1, 3, H, W] in [0, 1] of a PIL picture."""
    import numpy as np

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def captions(count: int = 20) -> list[str]:
    """Different prompts, some longer than any limit."""
    colours, things = ["red", "blue", "green", "small", "big"], ["dog", "cat", "circle", "star"]
    made = [f"a {colour} {thing} on the left" for colour in colours for thing in things]
    made[3] = " ".join(made)
    made[7] = "Two   BIG dogs, and the cat's star!"
    return made[:count]
