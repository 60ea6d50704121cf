"""LoRA weights in the layouts of PEFT, diffusers and kohya: the only place that knows their names.

Ours, PEFT's bare names: `encoder.layers.0.self_attn.q_proj.lora_A.weight` for each of `text_encoder` and `unet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Adapters = Mapping[str, Mapping[str, Tensor]]  # part -> PEFT's bare names -> weights
KOHYA = {"text_encoder": "lora_te", "unet": "lora_unet"}


def to_diffusers(adapters: Adapters) -> dict[str, Tensor]:
    """As diffusers' `load_lora_weights` takes them: `text_encoder.text_model. ... .lora_A.weight`, `unet. ...`."""
    return {f"{part}.{_path(part, key)}": value for part, state in adapters.items() for key, value in state.items()}


def to_kohya(adapters: Adapters, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """As A1111 and ComfyUI take them: `lora_te_text_model_ ... _q_proj.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    Args:
        alphas: numerator of each part's scale alpha / rank.
    """
    made = {}
    for part, state in adapters.items():
        for key, value in state.items():
            module, _, side = _path(part, key).removesuffix(".weight").rpartition(".lora_")
            name = f"{KOHYA[part]}_{module.replace('.', '_')}"
            made[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = value
            made[f"{name}.alpha"] = torch.tensor(float(alphas[part]), dtype=value.dtype)
    return made


def _path(part: str, key: str) -> str:
    bare = key.removeprefix("base_model.model.").removeprefix("text_model.")
    return f"text_model.{bare}" if part == "text_encoder" else bare


def extract(before: Mapping[str, Tensor], after: Mapping[str, Tensor], rank: int, targets: Sequence[str]) -> dict[str, Tensor]:
    """The best approximation of rank `rank` of each target matrix's change, by singular values; alpha is the rank.

    What changed elsewhere (embeddings, norms, biases) has no place in a LoRA and is lost.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"lora_rank={rank}, accepted: 1 or more")
    made = {}
    for key, value in after.items():
        module = key.removesuffix(".weight")
        if not key.endswith(".weight") or value.ndim != 2 or not module.endswith(tuple(f".{name}" for name in targets)):
            continue
        u, s, v = torch.linalg.svd((value - before[key]).float(), full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        made[f"{module}.lora_A.weight"] = (root[:, None] * v[:kept]).contiguous()
        made[f"{module}.lora_B.weight"] = (u[:, :kept] * root).contiguous()
    return made
