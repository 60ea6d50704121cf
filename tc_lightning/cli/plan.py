"""plan=true of verb train: what the run will cost."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from tc_lightning.cli import build, record
from tc_lightning.module import TextCraftor
from tc_lightning.planner import plan


def show_plan(cfg: DictConfig) -> dict[str, Any]:
    """Measure one step of the composed run and print its costs; nothing is trained and no run folder is kept."""
    build.check_numbers(cfg)
    backbone = build.build_backbone(cfg)
    data = build.build_data(cfg, backbone)
    module = build.build_method(cfg, backbone)
    if not isinstance(module, TextCraftor):
        raise ValueError(f"plan=true counts a step of method=textcraftor, not of {type(module).__name__}")
    trainer = instantiate(cfg.trainer, logger=False, enable_checkpointing=False)
    module.to(trainer.strategy.root_device)
    steps = cfg.max_steps * trainer.accumulate_grad_batches
    an_epoch = len(data.splits["train"]) // (data.batch_size * trainer.world_size)
    batch = next(data.batches(0, trainer.world_size, 1))
    with trainer.precision_plugin.forward_context():
        module.lower_frozen(trainer.precision)
        found = plan(module, batch, steps, trainer.world_size, an_epoch * data.seeds_per_prompt)
    record.table("plan", found.rows() | {"device": str(module.device), "precision": str(trainer.precision)})
    record.console.print("next        the same command without plan=true")
    return {"verb": "train", "status": "planned", **vars(found)}
