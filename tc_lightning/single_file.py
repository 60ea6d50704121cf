"""The original Stable Diffusion key layout, which ComfyUI and A1111 read: the only place that knows its names.

Parts of the file: `model.diffusion_model.` is the UNet, `first_stage_model.` the VAE, `cond_stage_model.` the text encoder
(Rombach et al., CVPR 2022; the published Stable Diffusion 1.5 file holds 686 + 248 + 197 tensors).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
# Where a text encoder's state dict may begin: DDP, Stable Diffusion 1, SDXL's first encoder, SD3's, a pipeline's own.
TEXT_PREFIXES = (
    "module.",
    "state_dict.",
    CLIP,
    "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoder.",
    "text_model.",
)

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet2DConditionModel's state dict under its original names.

    Raises:
        ValueError: a key that the original layout has no place for, by name.
    """
    layers = 1 + max(int(match[1]) for key in state if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key)))
    return {UNET + _unet_key(key, layers, state): value for key, value in state.items()}


def _unet_key(key: str, layers: int, state: Mapping[str, Tensor]) -> str:
    module, _, leaf = key.rpartition(".")
    if module in _UNET_ENDS:
        return f"{_UNET_ENDS[module]}.{leaf}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
        kind, number, rest = match.groups()
        return f"middle_block.{2 * int(number) + (kind == 'attentions')}.{_unet_inner(kind, rest)}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
        side, block, kind, layer, rest = match.groups()
        place = int(layer) + 1 + int(block) * (layers + 1) if side == "down" else int(layer) + int(block) * (layers + 1)
        blocks = "input_blocks" if side == "down" else "output_blocks"
        return f"{blocks}.{place}.{int(kind == 'attentions')}.{_unet_inner(kind, rest)}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.(.+)", key):
        side, block, rest = match[1], int(match[2]), match[3]
        if side == "down":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest}"
        attended = any(name.startswith(f"up_blocks.{block}.attentions.") for name in state)
        return f"output_blocks.{(block + 1) * (layers + 1) - 1}.{1 + attended}.conv.{rest}"
    raise ValueError(f"the original Stable Diffusion layout has no place for the UNet's {key}")


def _unet_inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    module, _, leaf = rest.rpartition(".")
    return f"{_UNET_RESNET[module]}.{leaf}"


def vae_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AutoencoderKL's state dict under its original names; its attention becomes 1x1 convolutions, as there.

    Raises:
        ValueError: a key that the original layout has no place for, by name.
    """
    ups = 1 + max(int(match[1]) for key in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    made = {}
    for key, value in state.items():
        name = _vae_key(key, ups)
        is_projection = re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$", name) and value.ndim == 2
        made[VAE + name] = value[:, :, None, None] if is_projection else value
    return made


def _vae_key(key: str, ups: int) -> str:
    if re.match(r"(post_)?quant_conv\.|(en|de)coder\.conv_(in|out)\.", key):
        return key
    if match := re.match(r"((?:en|de)coder)\.conv_norm_out\.(.+)", key):
        return f"{match[1]}.norm_out.{match[2]}"
    if match := re.match(r"((?:en|de)coder)\.mid_block\.resnets\.(\d)\.(.+)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{_shortcut(match[3])}"
    if match := re.match(r"((?:en|de)coder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", key):
        return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|(downsamplers)\.0)\.(.+)", key):
        inner = f"block.{match[2]}." if match[2] else "downsample."
        return f"encoder.down.{match[1]}.{inner}{_shortcut(match[4])}"
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|(upsamplers)\.0)\.(.+)", key):
        inner = f"block.{match[2]}." if match[2] else "upsample."
        return f"decoder.up.{ups - 1 - int(match[1])}.{inner}{_shortcut(match[4])}"  # numbered from the image inwards
    raise ValueError(f"the original Stable Diffusion layout has no place for the VAE's {key}")


def _shortcut(rest: str) -> str:
    return rest.replace("conv_shortcut", "nin_shortcut")


def text_to_original(state: Mapping[str, Tensor], open_clip: bool = False) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict, with or without `text_model.`, under its original names.

    Args:
        open_clip: Stable Diffusion 2's layout, with q, k and v in one matrix; else Stable Diffusion 1's.
    """
    state = plain_text_state(state)
    if not open_clip:
        length = state["embeddings.position_embedding.weight"].shape[0]
        made = {f"{CLIP}text_model.{key}": value for key, value in state.items()}
        return made | {f"{CLIP}text_model.embeddings.position_ids": torch.arange(length)[None]}
    made = {}
    for key, value in state.items():
        match = re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if match is None:
            made[OPEN_CLIP + _OPEN_CLIP_ENDS[key]] = value
        elif match[2] in _OPEN_CLIP_LAYER:
            made[f"{OPEN_CLIP}transformer.resblocks.{match[1]}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = value
        elif match[2] == "self_attn.q_proj":
            joined = [state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            made[f"{OPEN_CLIP}transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(joined)
    return made


def text_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The text encoder of any known file (transformers, DDP, Stable Diffusion 1 and 2, SDXL's first), bare keys.

    None where no known text encoder is in it.
    """
    for prefix in ("", OPEN_CLIP):
        if f"{prefix}transformer.resblocks.0.ln_1.weight" in state:
            return _from_open_clip({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    for prefix in ("", *_prefixes(state)):
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if "embeddings.token_embedding.weight" in inner:
            return plain_text_state(inner)
    return None


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Known beginnings, nested as in this file: "module.text_model." and the like."""
    ends = [key.removesuffix("embeddings.token_embedding.weight") for key in state if key.endswith("token_embedding.weight")]
    known = []
    for prefix in ends:
        rest, before = prefix, None
        while rest != before:
            before, rest = rest, next((rest.removeprefix(start) for start in TEXT_PREFIXES if rest.startswith(start)), rest)
        known += [prefix] if not rest else []
    return known


def _from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    ends = {theirs: ours for ours, theirs in _OPEN_CLIP_ENDS.items()}
    inner = {theirs: ours for ours, theirs in _OPEN_CLIP_LAYER.items()}
    made = {ends[key]: value for key, value in state.items() if key in ends}
    for key, value in state.items():
        match = re.match(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)$", key)
        if match is None:
            continue
        place, module, leaf = f"encoder.layers.{match[1]}", match[2], match[3]
        if module == "attn.in_proj":
            for name, part in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                made[f"{place}.self_attn.{name}.{leaf}"] = part.clone()
        else:
            made[f"{place}.{inner[module]}.{leaf}"] = value
    return made


def plain_text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict with bare keys: without `text_model.` and without the position numbers, which are no weights."""
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    return {key: value for key, value in bare.items() if key != "embeddings.position_ids"}
