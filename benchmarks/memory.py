"""What fits on which card: memory of a training step of Stable Diffusion 1.5, counted on the meta device (nothing is run).

    python benchmarks/memory.py

Counted: weights in fp32, gradients and AdamW's two moments of what learns, and what autograd keeps in bf16 for one
recomputed UNet step, the VAE decode and one reward tower (published architectures; attention as a fused kernel keeps it).
Not counted: allocator slack, cuBLAS workspaces, the CUDA context; hence 1.5 GB and a tenth are added. Not measured.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tc_lightning.backbone import ARCHITECTURES

GB = 1e9
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
VIT_G = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16, "patch_size": 14}
TEXT_TOWER = {"H": 0.354e9, "L": 0.124e9, "g": 0.354e9}  # parameters of the text halves


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: query, key, value and the result."""

    @staticmethod
    def forward(ctx, query, key, value):
        result = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return gradient, torch.empty_like(key), torch.empty_like(value)


def kept_bytes(function) -> int:
    """Bytes that autograd keeps for backward while `function` runs, weights not counted."""
    seen: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and id(tensor.untyped_storage()) not in seen:
            seen[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
            keep.append(tensor)
        return tensor

    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: FusedAttention.apply(query, key, value)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function()
    finally:
        F.scaled_dot_product_attention = plain
    return sum(seen.values())


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parts() -> dict[str, nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    numbers = ARCHITECTURES["sd15"]
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**numbers["unet"]).bfloat16(),
            "vae": AutoencoderKL(**numbers["vae"]).bfloat16(),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**numbers["text_encoder"])).bfloat16(),
            **{
                name: CLIPVisionModel(CLIPVisionConfig(**size, image_size=224)).bfloat16()
                for name, size in (("H", VIT_H), ("L", VIT_L), ("g", VIT_G))
            },
        }


def activations(made: dict[str, nn.Module], batch: int, tune_unet: bool) -> dict[str, int]:
    """Bytes kept of one UNet step, the decode and each tower."""
    for name, module in made.items():
        module.requires_grad_(tune_unet and name == "unet")
    options = {"device": "meta", "dtype": torch.bfloat16}
    latents = torch.empty(2 * batch, 4, 64, 64, **options, requires_grad=True)
    embeds = torch.empty(2 * batch, 77, 768, **options, requires_grad=True)
    timestep = torch.zeros((), device="meta")
    pixels = torch.empty(batch, 3, 224, 224, **options, requires_grad=True)
    kept = {"unet": kept_bytes(lambda: made["unet"](latents, timestep, embeds))}
    kept["vae"] = kept_bytes(lambda: made["vae"].decode(latents[:batch]))
    return kept | {name: kept_bytes(lambda name=name: made[name](pixels)) for name in ("H", "L", "g")}


def total(made: dict[str, nn.Module], batch: int, towers: str, learns: str) -> float:
    """GB of a step: `towers` are letters of H, L, g; `learns` is text, lora (UNet) or unet."""
    kept = activations(made, batch, learns == "unet")
    weights = 4 * sum(parameters(made[name]) for name in ("unet", "vae", "text_encoder"))
    weights += 4 * sum(parameters(made[name]) + TEXT_TOWER[name] for name in towers)
    learnt = {"text": parameters(made["text_encoder"]), "lora": 0.8e6, "unet": parameters(made["unet"])}[learns]
    state = 12 * learnt + (4 * learnt if learns == "text" else 0)  # gradient, two moments; the frozen copy of the text encoder
    # The decode's and the towers' activations are alive while the UNet's steps are only checkpoints, and gone when these
    # are recomputed: the larger of the two counts.
    peak = max(kept["vae"] + sum(kept[name] for name in towers), kept["unet"])
    return 1.1 * (weights + state + peak) / GB + 1.5


def main() -> None:
    made = parts()
    print("GB, computed, not measured: SD 1.5, 512 px, bf16 autocast over fp32 weights, chain.keep_activations=none\n")
    print("| what learns | rewards | batch 1 | batch 4 | batch 8 |\n|---|---|---|---|---|")
    rows = (("text", "", "none but a function of pixels"), ("text", "L", "aesthetic"), ("text", "HH", "hpsv2, pickscore"))
    rows += (("text", "HHLg", "hpsv2, pickscore, aesthetic, CLIP constraint"), ("unet", "HHLg", "the same four"))
    for learns, towers, label in rows:
        cells = " | ".join(f"{total(made, batch, towers, learns):.0f}" for batch in (1, 4, 8))
        print(f"| {learns} | {label} | {cells} |")


if __name__ == "__main__":
    main()
