"""What a run was made of: hashes of its prompts and of every frozen network, kept in run.json and in its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from tc_lightning.prompt_files import StreamedPrompts

KEPT = ("config", "overrides", "versions", "git", "hashes")
# of a run that is resumed; the others (how long, how often, where to) may change
FIXED = ("seed", "method.", "backbone.", "reward.", "constraint.", "schedule.", "optimizer.", "tune.")
FIXED += tuple(f"chain.{name}" for name in ("steps", "guidance_scale", "timestep_spacing"))


def hash_prompts(splits: Mapping[str, Sequence[str]]) -> str:
    """16 hexadecimal digits of all prompts in their order and split; of a file that is read by row, its own digest."""
    told = {k: v.digest() if isinstance(v, StreamedPrompts) else list(v) for k, v in splits.items()}
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def hash_network(network: nn.Module) -> str:
    """16 hexadecimal digits of names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted([*network.named_parameters(), *network.named_buffers()]):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hashes(module: LightningModule, splits: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{"prompts": ..., "networks": {name: ...}} of what does not learn; call it before the first step."""
    backbone = module.backbone
    networks = {part: getattr(backbone, part) for part in ("text_encoder", "vae", "unet")}
    for key in ("reward", "constraint", "watch"):
        mix = getattr(module, key, None)
        networks |= {f"{key}.{name}": reward for name, reward in mix.rewards.items()} if mix is not None else {}
    found = {name: hash_network(network) for name, network in networks.items() if any(True for _ in network.parameters())}
    return {"prompts": hash_prompts(splits), "networks": found}


def refuse_changes(checkpoint: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """A resumed run is the same run: what it learns from, how and with which chain must be as in the checkpoint's record.

    Raises:
        ValueError: names the keys that differ, with both values.
    """
    before = _flat((checkpoint.get("run") or {}).get("config") or {})
    now = _flat(json.loads(json.dumps(config, default=str)))
    if not before:
        return
    odd = [key for key in sorted({*before, *now}) if key.startswith(FIXED) and before.get(key) != now.get(key)]
    if odd:
        shown = ", ".join(f"{key} was {before.get(key, 'absent')} and is {now.get(key, 'absent')}" for key in odd[:3])
        raise ValueError(
            f"ckpt_path continues a run, and {len(odd)} of its settings changed: {shown}. Give them as they were "
            "(.hydra/overrides.yaml has them), or start a new run from this one with backbone.text_encoder=<run folder>"
        )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


class Provenance(Callback):
    """Puts a run's record into its checkpoints, and says so when a resumed run is made of something else.

    Args:
        record: what run.json holds; of it config, overrides, versions, git and hashes are kept.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = {key: record[key] for key in KEPT if key in record}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Under "run", as plain data."""
        checkpoint["run"] = json.loads(json.dumps(self.record, default=str))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare; a resumed run may differ on purpose."""
        before, now = checkpoint.get("run", {}).get("hashes", {}), self.record.get("hashes", {})
        odd = ["the prompts"] if before.get("prompts") not in (None, now.get("prompts")) else []
        networks = before.get("networks", {})
        odd += [name for name, value in now.get("networks", {}).items() if networks and networks.get(name) != value]
        if odd:
            rank_zero_warn(f"this run was made of something else until here: {', '.join(odd)} changed since the checkpoint")
