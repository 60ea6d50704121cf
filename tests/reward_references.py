"""The published scorers' arithmetic, written from their papers and layouts in plain torch, to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention [B, L, W]; mask is added to the logits."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return ((logits + (0 if mask is None else mask)).softmax(-1) @ value).transpose(1, 2).flatten(2)


class Weights:
    """Reads layers of a state dict by name."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)


def open_clip_tower(weights: Weights, prefix: str, x: Tensor, layers: int, heads: int, mask: Tensor | None) -> Tensor:
    """Pre-norm transformer with one matrix for query, key and value."""
    for index in range(layers):
        block = f"{prefix}transformer.resblocks.{index}"
        h = weights.norm(f"{block}.ln_1", x)
        joint = F.linear(h, weights.state[f"{block}.attn.in_proj_weight"], weights.state[f"{block}.attn.in_proj_bias"])
        x = x + weights.linear(f"{block}.attn.out_proj", attention(*joint.chunk(3, -1), heads, mask))
        h = F.gelu(weights.linear(f"{block}.mlp.c_fc", weights.norm(f"{block}.ln_2", x)))
        x = x + weights.linear(f"{block}.mlp.c_proj", h)
    return x


def open_clip_image(state: dict[str, Tensor], config: dict, pixels: Tensor) -> Tensor:
    """Unit image embeddings of normalised pixels."""
    weights, vision = Weights(state), config["vision_cfg"]
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = weights.norm("visual.ln_pre", torch.cat([first, x], 1) + state["visual.positional_embedding"])
    x = open_clip_tower(weights, "visual.", x, vision["layers"], vision["width"] // vision["head_width"], None)
    return F.normalize(weights.norm("visual.ln_post", x[:, 0]) @ state["visual.proj"], dim=-1)


def open_clip_text(state: dict[str, Tensor], config: dict, input_ids: Tensor) -> Tensor:
    """Unit text embeddings, taken at the highest token."""
    weights, text = Weights(state), config["text_cfg"]
    x = F.embedding(input_ids, state["token_embedding.weight"]) + state["positional_embedding"][: input_ids.shape[1]]
    mask = torch.full((input_ids.shape[1],) * 2, float("-inf")).triu(1)
    x = weights.norm("ln_final", open_clip_tower(weights, "", x, text["layers"], text["heads"], mask))
    return F.normalize(x[torch.arange(len(x)), input_ids.argmax(-1)] @ state["text_projection"], dim=-1)


def linear_head(state: dict[str, Tensor], x: Tensor, prefix: str = "") -> Tensor:
    """Five linear layers, nothing between them."""
    for index in (0, 2, 4, 6, 7):
        x = Weights(state).linear(f"{prefix}layers.{index}", x)
    return x.squeeze(-1)


def image_reward(state: dict[str, Tensor], config: dict, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Raw ImageReward of normalised pixels and tokens."""
    weights, vision, text = Weights(state), "blip.visual_encoder", "blip.text_encoder"
    patch = state[f"{vision}.patch_embed.proj.weight"]
    x = F.conv2d(pixels, patch, state[f"{vision}.patch_embed.proj.bias"], stride=config["patch_size"])
    x = torch.cat([state[f"{vision}.cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{vision}.pos_embed"]
    for index in range(config["vision_layers"]):
        block = f"{vision}.blocks.{index}"
        joint = weights.linear(f"{block}.attn.qkv", weights.norm(f"{block}.norm1", x, 1e-6))
        x = x + weights.linear(f"{block}.attn.proj", attention(*joint.chunk(3, -1), config["vision_heads"]))
        h = F.gelu(weights.linear(f"{block}.mlp.fc1", weights.norm(f"{block}.norm2", x, 1e-6)))
        x = x + weights.linear(f"{block}.mlp.fc2", h)
    image = weights.norm(f"{vision}.norm", x, 1e-6)

    embeddings = f"{text}.embeddings"
    x = F.embedding(input_ids, state[f"{embeddings}.word_embeddings.weight"])
    x = x + state[f"{embeddings}.position_embeddings.weight"][: input_ids.shape[1]]
    x = weights.norm(f"{embeddings}.LayerNorm", x, 1e-12)
    padding = (1 - attention_mask[:, None, None, :].float()) * -1e4
    for index in range(config["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{index}"
        for kind, source, mask in (("attention", None, padding), ("crossattention", image, None)):
            source = x if source is None else source
            parts = [
                weights.linear(f"{layer}.{kind}.self.{part}", y) for part, y in (("query", x), ("key", source), ("value", source))
            ]
            h = weights.linear(f"{layer}.{kind}.output.dense", attention(*parts, config["num_attention_heads"], mask))
            x = weights.norm(f"{layer}.{kind}.output.LayerNorm", x + h, 1e-12)
        h = weights.linear(f"{layer}.output.dense", F.gelu(weights.linear(f"{layer}.intermediate.dense", x)))
        x = weights.norm(f"{layer}.output.LayerNorm", x + h, 1e-12)
    return linear_head(state, x[:, 0], "mlp.")


def pil_pixels(picture, size: int, fit: str) -> Tensor:
    """Normalised pixels [1, 3, size, size] by PIL, as the scorers do it from the picture on."""
    import numpy as np
    from PIL import Image

    width, height = picture.size
    if fit == "pad":
        from torch.nn import functional

        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None] / 255
        scale = size / max(width, height)
        new = (round(height * scale), round(width * scale))
        tensor = functional.interpolate(tensor, new, mode="bicubic", antialias=True)
        canvas = torch.zeros(1, 3, size, size)
        top, left = (size - new[0]) // 2, (size - new[1]) // 2
        canvas[..., top : top + new[0], left : left + new[1]] = tensor
        return (canvas - MEAN) / STD
    short = min(width, height)
    picture = picture.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) if fit == "crop" else (side - size) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + size, top + size))
    return (torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None] / 255 - MEAN) / STD
