"""ImageReward's network in transformers' parts: BLIP's image encoder, a BERT that looks at the image, and a head."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, PreTrainedModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from tc_lightning.rewards.checkpoints import check_layout, read_state_dict
from tc_lightning.rewards.head import LinearHead

# med_config.json of THUDM/ImageReward: bert-base with two more tokens
MED_CONFIG = {
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "vocab_size": 30524,
}
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."


class BlipReward(nn.Module):
    """Frozen BLIP with ImageReward's head.

    Args:
        vision: BLIP's image encoder.
        text: BERT with cross-attention to the image, attention over the prompt in both directions.
        head: head on the first token.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: LinearHead) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.image_size = vision.config.image_size
        self.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores [B] of normalised pixels [B, 3, S, S] and tokens [B, L]."""
        image = self.vision(pixel_values=pixel_values.to(self.vision.dtype)).last_hidden_state
        hidden = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image).last_hidden_state
        first = hidden[:, 0]
        return self.head(first.to(torch.promote_types(first.dtype, torch.float32)))

    def train(self, mode: bool = True) -> "BlipReward":
        """Does nothing: the network is always in eval mode."""
        return super().train(False)


def read_blip_reward(path: Path, config: str | Path | Mapping | None = None, sha256: str | None = None) -> tuple[BlipReward, dict]:
    """The network of a file in the layout of ImageReward.pt, in fp32, and its configuration.

    Args:
        path: the checkpoint.
        config: med_config.json (path or mapping), the published one by default. A key "vision_heads" gives the image encoder's
            number of heads, by default its width / 64; its other sizes are read from the weights.
        sha256: expected hash.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_state_dict`; names or shapes that do not fit.
    """
    if isinstance(config, (str, Path)):
        config = json.loads(Path(config).read_text())
    config = {**MED_CONFIG, **(config or {})}
    state = read_state_dict(path, sha256)
    parts = {prefix: {} for prefix in (VISION, TEXT, HEAD)}
    for name, value in state.items():
        for prefix, part in parts.items():
            if name.startswith(prefix) and not name.endswith("position_ids"):
                part[name.removeprefix(prefix)] = value
    lacking = [prefix for prefix, part in parts.items() if not part]
    if lacking:
        raise ValueError(
            f"{path} is not in ImageReward's layout: no names begin with {', '.join(lacking)}; it begins with {list(state)[:5]}"
        )
    vision = _build(
        BlipVisionModel, _vision_config(parts[VISION], config, path), _vision_names(parts[VISION]), f"{path} ({VISION})"
    )
    text_config = _text_config(config, vision.config.hidden_size)
    text = _build(BlipTextModel, text_config, parts[TEXT], f"{path} ({TEXT})", add_pooling_layer=False)
    return BlipReward(vision, text, LinearHead.from_state_dict(parts[HEAD], f"{path} ({HEAD})")), config


def _build(kind: type[PreTrainedModel], config: object, state: dict[str, Tensor], source: str, **kwargs) -> PreTrainedModel:
    with torch.device("meta"):
        expected = kind(config, **kwargs).state_dict()
    check_layout(expected, state, source)
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, **kwargs)


def _vision_config(state: Mapping[str, Tensor], config: Mapping, path: Path) -> BlipVisionConfig:
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise ValueError(f"{path} is not in ImageReward's layout: {VISION}{name} is missing")
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_attention_heads=config.get("vision_heads") or width // 64,
        image_size=side * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
    )


def _text_config(config: Mapping, image_width: int) -> BlipTextConfig:
    return BlipTextConfig(
        **{key: config[key] for key in MED_CONFIG},
        encoder_hidden_size=image_width,
        is_decoder=True,  # builds the cross-attention; the call leaves attention over the prompt bidirectional
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )


_VISION_OUTER = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _vision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_vision_name(name): value for name, value in state.items()}


def _vision_name(name: str) -> str:
    if name in _VISION_OUTER:
        return _VISION_OUTER[name]
    module, _, kind = name.rpartition(".")
    if module in _VISION_OUTER:
        return f"{_VISION_OUTER[module]}.{kind}"
    if name.startswith("blocks."):
        _, index, rest = module.split(".", 2)
        return f"encoder.layers.{index}.{_VISION_BLOCK.get(rest, rest)}.{kind}"
    return name
