"""The steps of a chain before the gradient, computed once and kept.

While only the text encoder learns, the steps before the first gradient step run frozen weights on the original text: what they
give depends on (model, prompt, noise seed, settings of the chain) and not on what is being learnt. It is the larger part of a
step's cost (20 of 25 steps in TextCraftor, Algorithm 1) and the same for every epoch and every run over other rewards, weights
or learning rates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tc_lightning.backbone import Backbone
from tc_lightning.chain import Chain
from tc_lightning.records import KEY, RecordStore

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VERSION = 1  # of what a record means; another one never hits


class PrefixCache:
    """Latents that enter the first gradient step, by (prompt, noise seed), in a folder that runs share.

    Records lie in <dir>/<fingerprint>, see records.RecordStore; fingerprint.json there says what they were computed with.

    Args:
        dir: the cache folder.
        max_gb: 10^9 bytes of all fingerprints together, None for no limit.
        dtype: of the records: float32 gives back the computed bits; float16 and bfloat16 halve the space, and are rounded at once,
            so that a run meets the same numbers whether it computes or reads them.

    Raises:
        ValueError: an unknown dtype or a limit that is not positive.
    """

    def __init__(self, dir: str | Path, max_gb: float | None = None, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"cache.dtype={dtype}: accepted are {', '.join(DTYPES)}")
        if max_gb is not None and not max_gb > 0:
            raise ValueError(f"cache.max_gb={max_gb}: accepted is a number above 0, or null for no limit")
        self.dir, self.max_gb, self.dtype = Path(dir).expanduser(), max_gb, DTYPES[dtype]
        self.store: RecordStore | None = None
        self.hits = self.misses = 0
        self.hit_rate = 0.0  # of the last batch

    def open(self, fields: dict[str, Any], shape: tuple[int, int, int]) -> PrefixCache:
        """Use the records of one fingerprint; latents are [B, *shape]."""
        self.shape = tuple(shape)
        fields = {"version": VERSION, **fields, "shape": list(shape), "storage": str(self.dtype).removeprefix("torch.")}
        folder = self.dir / digest(fields)
        record_bytes = torch.Size(shape).numel() * self.dtype.itemsize
        self.store = RecordStore(folder, record_bytes, None if self.max_gb is None else int(self.max_gb * 1e9))
        part = folder / f"fingerprint.{os.getpid()}.part"
        part.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        os.replace(part, folder / "fingerprint.json")
        return self

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], compute: Callable[[Sequence[str], Sequence[int]], Tensor]
    ) -> Tensor:
        """Latents [B, C, h, w] in fp32 on the CPU: read where they are kept; the others computed in one call, and kept.

        `compute(prompts, seeds)` gives [b, C, h, w] on any device.
        """
        self.store.refresh(at_most_every=5.0)
        keys = [key_of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = {key: self._read(key) for key in keys}
        absent = [row for row, key in enumerate(keys) if found[key] is None]
        self.hit_rate = 1 - len(absent) / len(keys)
        self.hits, self.misses = self.hits + len(keys) - len(absent), self.misses + len(absent)
        if absent:
            made = compute([prompts[row] for row in absent], [seeds[row] for row in absent])
            made = made.detach().to("cpu", self.dtype).contiguous()
            for row, latents in zip(absent, made, strict=True):
                self.store.put(keys[row], latents.reshape(-1).view(torch.uint8).numpy())
                found[keys[row]] = latents
        return torch.stack([found[key] for key in keys]).float()

    def record(self) -> dict[str, Any]:
        """For a run's record: where, how many latents were read and how many computed."""
        return {"folder": str(self.store.folder) if self.store else str(self.dir), "hits": self.hits, "misses": self.misses}

    def has(self, prompt: str, seed: int) -> bool:
        """Whether a record is kept; its bytes are not looked at."""
        return key_of(prompt, seed) in self.store

    def _read(self, key: bytes) -> Tensor | None:
        payload = self.store.get(key)
        return None if payload is None else torch.from_numpy(payload).view(self.dtype).reshape(self.shape)


def key_of(prompt: str, seed: int) -> bytes:
    """16 bytes of a prompt and its noise seed."""
    return blake2b(f"{seed}\0{prompt}".encode(), digest_size=KEY).digest()


def digest(value: Any) -> str:
    """32 letters of any plain data."""
    return blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def prefix_length(first_gradient_step: int, first_tuned_step: int, unet_mode: str = "frozen") -> int:
    """Steps whose result never changes while the run learns: those before both the gradient and the tuned text.

    Raises:
        ValueError: there are none, and why.
    """
    if unet_mode != "frozen":
        raise ValueError(
            f"cache.dir keeps the steps before the gradient, and with tune.unet={unet_mode} they change at every step: "
            "cache.dir=null, or tune.unet=frozen"
        )
    length = min(first_gradient_step, first_tuned_step)
    if length == 0:
        raise ValueError(
            "cache.dir keeps the steps before the gradient, and this schedule has none: the tuned text is seen from the first step "
            "on. cache.dir=null, or a schedule such as schedule=last_k"
        )
    return length


def fingerprint(backbone: Backbone, original: nn.Module, chain: Chain, length: int) -> dict[str, Any]:
    """Everything the first `length` steps depend on beside prompt and seed, by name; to be taken where the steps will run.

    `original` is the text encoder that they see. The arithmetic is a part of it: precision and kernels decide the last bits.
    """
    return {
        "unet": weights_digest(backbone.unet),
        "unet_config": config_digest(dict(backbone.unet.config)),
        "text_encoder": weights_digest(original),
        "text_encoder_config": config_digest(original.config.to_dict()),
        "tokenizer": tokenizer_digest(backbone.tokenizer),
        "prediction_type": chain.prediction_type,
        "alpha_bars": [[float(value) for value in chain.alpha_bar(i)] for i in range(length)],
        "timesteps": chain.timesteps[:length],
        "steps": len(chain),
        "length": length,
        "guidance_scale": chain.guidance_scale,
        "arithmetic": arithmetic(backbone.unet),
    }


def arithmetic(unet: nn.Module) -> dict[str, Any]:
    """How numbers are made here and now: device, dtype of the weights, autocast, matmul precision, layout, compilation."""
    parameter = next(unet.parameters())
    kind = parameter.device.type
    return {
        "device": kind,
        "weights": str(parameter.dtype),
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None,
        "matmul": torch.get_float32_matmul_precision(),
        "channels_last": any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in _kernels(unet)),
        "compiled": unet._compiled_call_impl is not None,
    }


def _kernels(unet: nn.Module) -> list[Tensor]:
    """Weights whose layout can be told: 1x1 kernels are contiguous in both."""
    return [p for p in unet.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1]


def weights_digest(model: nn.Module) -> str:
    """Of every parameter and buffer with its name; adapters that add nothing yet (lora_B zero) do not count."""
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    idle = {name.split(".lora_B.")[0] for name, value in state.items() if ".lora_B." in name and not value.any()}
    whole = blake2b(digest_size=16)
    for name in sorted(state):
        if ".lora_" in name and name.split(".lora_")[0] in idle:
            continue
        value = state[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """Of an architecture: not of where it was loaded from or by which version."""
    aside = ("transformers_version", "dtype", "torch_dtype")
    return digest({name: value for name, value in config.items() if not name.startswith("_") and name not in aside})


def tokenizer_digest(tokenizer: Any) -> str:
    """Of the vocabulary and rules; padding and cutting, which a call changes, are the limit's."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    return digest([rules, tokenizer.model_max_length, tokenizer.pad_token_id])
