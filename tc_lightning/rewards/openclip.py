"""open_clip's checkpoints and text cleaning, read into transformers' CLIPModel: one CLIP implementation for all rewards."""

import html
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tc_lightning.rewards.checkpoints import check_layout, read_state_dict

_TEXT_H = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
ARCHITECTURES = {
    "ViT-L-14-quickgelu": {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    },
    "ViT-H-14": {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": _TEXT_H,
    },
    "ViT-g-14": {
        "embed_dim": 1024,
        "vision_cfg": {
            "image_size": 224,
            "layers": 40,
            "width": 1408,
            "head_width": 88,
            "mlp_ratio": 4.3637,
            "patch_size": 14,
        },
        "text_cfg": _TEXT_H,
    },
}
_VISION_KEYS = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_IGNORED = ("attn_mask", "logit_bias")  # a buffer of old versions; a term of the SigLIP loss


def clean_prompt(prompt: str) -> str:
    """The prompt as open_clip's tokenizer reads it: curly quotes and broken characters mended, HTML entities resolved."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def clip_from_file(path: Path, config: str | Path | Mapping | None, sha256: str | None = None) -> CLIPModel:
    """CLIPModel in fp32 of a file in open_clip's layout.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_state_dict`; unknown config; names or shapes that do not fit it.
    """
    clip_config = open_clip_config(config)
    state = convert(read_state_dict(path, sha256), str(path))
    with torch.device("meta"):
        expected = CLIPModel(clip_config).state_dict()
    check_layout(expected, state, str(path))
    # from_pretrained with a state dict: the module is built without the minute of random numbers a ViT-g would cost
    return CLIPModel.from_pretrained(None, config=clip_config, state_dict=state, dtype=torch.float32)


def open_clip_config(config: str | Path | Mapping | None) -> CLIPConfig:
    """transformers' config of an open_clip architecture.

    Args:
        config: a name of ARCHITECTURES, the path of an open_clip_config.json, or its mapping with embed_dim, vision_cfg and
            text_cfg; a CLIPConfig passes.

    Raises:
        ValueError: unknown name, or a key this reader does not know (another kind of tower).
    """
    if isinstance(config, CLIPConfig):
        return config
    if isinstance(config, (str, Path)) and str(config) in ARCHITECTURES:
        config = ARCHITECTURES[str(config)]
    elif isinstance(config, (str, Path)) and Path(config).is_file():
        config = json.loads(Path(config).read_text())
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config {config!r} of an open_clip file is not one of {', '.join(ARCHITECTURES)}, nor an open_clip_config.json, nor a "
            "mapping with embed_dim, vision_cfg and text_cfg"
        )
    config = config.get("model_cfg", config)
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    unknown = [key for key in (*vision, *text) if key not in _VISION_KEYS | _TEXT_KEYS]
    if unknown or not {"layers", "width"} <= vision.keys() & text.keys():
        raise ValueError(f"open_clip config has no plain ViT and text transformer; keys not known: {', '.join(unknown) or 'none'}")
    common = {
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            **common,
            **_transformer(vision, vision["width"] // vision.get("head_width", 64)),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision["patch_size"],
        },
        text_config={
            **common,
            **_transformer(text, text["heads"]),
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": None,
            "eos_token_id": 2,  # transformers' sign for pooling at the highest id, which is how open_clip pools
            "pad_token_id": None,
        },
    )


def _transformer(config: Mapping, heads: int) -> dict[str, int]:
    return {
        "hidden_size": config["width"],
        "intermediate_size": int(config["width"] * config.get("mlp_ratio", 4.0)),
        "num_hidden_layers": config["layers"],
        "num_attention_heads": heads,
    }


_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
_NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
_STACKS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def convert(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Names of open_clip's CLIP turned into those of transformers' CLIPModel; a name it does not know stays as it is."""
    if "visual.conv1.weight" not in state or not any(name.startswith("transformer.resblocks.") for name in state):
        names = ", ".join(list(state)[:5])
        raise ValueError(
            f"{source} is not in open_clip's layout (no visual.conv1.weight or no text transformer); it begins with {names}"
        )
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _IGNORED:
            continue
        if name in ("visual.proj", "text_projection"):  # kept as [width, embed]: nn.Linear has it the other way round
            converted[{"visual.proj": "visual_projection"}.get(name, name) + ".weight"] = value.T.contiguous()
        elif name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")):
            block, kind = name.rsplit(".attn.in_proj_", 1)
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"{_rename(block + '.')}self_attn.{part}_proj.{kind}"] = rows.contiguous()
        else:
            converted[_rename(name)] = value
    return converted


def _rename(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    module, _, kind = name.rpartition(".")
    if module in _NORMS:
        return f"{_NORMS[module]}.{kind}"
    for stack, new_stack in _STACKS.items():
        if name.startswith(stack):
            index, _, rest = name.removeprefix(stack).partition(".")
            inner, _, kind = rest.rpartition(".")
            return f"{new_stack}{index}.{_BLOCK.get(inner, inner)}{'.' if inner else ''}{kind}"
    return name
