"""Verb train: compose, measure, fine-tune, measure again, export."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_only

from tc_lightning.backbone import Backbone, save_model
from tc_lightning.callbacks import BeforeAfter, SampleGrid
from tc_lightning.checkpoint_io import previous, read_checkpoint
from tc_lightning.cli import build, record, rerun
from tc_lightning.cli.errors import settings
from tc_lightning.cli.plan import show_plan
from tc_lightning.guard import Guard, is_out_of_memory, memory_advice
from tc_lightning.prompts import PromptData
from tc_lightning.provenance import Provenance, hashes, refuse_changes
from tc_lightning.ranks import RankWatch, started_from_outside
from tc_lightning.trainable import check_names, trainable_names


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the verb in Hydra's output folder; returns the run's record."""
    build.quiet()
    if cfg.plan:
        return show_plan(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    held = None
    with settings():
        build.check_numbers(cfg)
        checkpoint = _checkpoint(cfg.ckpt_path, folder)
        _check_processes(cfg)
        if rank_zero_only.rank == 0:
            held = record.hold(folder, wait=60.0 if checkpoint else 0.0)  # what saves after a signal may need a moment
            begun_only = cfg.ckpt_path == "auto" and record.unfinished(folder)  # killed before its first checkpoint
            record.refuse_overwrite(folder, checkpoint is not None or begun_only)
            if cfg.rerun is not None:
                rerun.say_differences(build.plain(cfg), Path(cfg.rerun))
        backbone, data, module, trainer = _parts(cfg, folder, checkpoint)
    card = _card(cfg, folder, backbone, data) | {"unet": _unet_cost(cfg, module)}
    if trainer.is_global_zero:
        record.write_hydra(folder, cfg)
        card["hashes"] = hashes(module, data.splits)
        trainer.callbacks.append(Provenance(card))
        record.write_record(folder, card)
        record.table("before", _summary(cfg, folder, module, data, trainer))
    try:
        return _fit(trainer, module, data, checkpoint, folder, card)
    finally:
        held.close() if held else None


def _parts(cfg: DictConfig, folder: Path, checkpoint: Path | None) -> tuple[Backbone, PromptData, LightningModule, Trainer]:
    """What a run is made of, or what is wrong with its settings; nothing is written yet."""
    saved = read_checkpoint(checkpoint) if checkpoint is not None else None
    if saved is not None:
        refuse_changes(saved, build.plain(cfg))
    backbone = build.build_backbone(cfg)
    data = build.build_data(cfg, backbone)
    module = build.build_method(cfg, backbone)
    if getattr(module, "needs_images", False):
        data.require_images(backbone.image_size)
    if saved is not None:
        check_names(saved["state_dict"], module)
    module.configure_optimizers()  # its settings' mistakes, before the run has a record
    return backbone, data, module, build.build_trainer(cfg, folder, checkpoint, steps_itself=not module.automatic_optimization)


def _check_processes(cfg: DictConfig) -> None:
    """Refuse processes that would not share one run folder, or would each start the whole sweep.

    Raises:
        ValueError: several processes from outside and no folder named; a job of several processes in the sweep's own.
    """
    given = HydraConfig.get()
    several = cfg.trainer.get("devices", 1) not in (1, "1") and "strategy" in cfg.trainer
    if given.mode == RunMode.MULTIRUN and several and not started_from_outside():
        raise ValueError("a job of several processes needs hydra/launcher=pool: in the sweep's own process each would start it all")
    if started_from_outside() and given.mode == RunMode.RUN and not any("hydra.run.dir=" in w for w in given.overrides.hydra):
        raise ValueError("several processes need one run folder: name it with hydra.run.dir=<folder>")


def _checkpoint(given: str | None, folder: Path) -> Path | None:
    if given == "auto":  # one command for a job that may be requeued: resume where there is something to resume
        given = "last" if (folder / "checkpoints" / "last.ckpt").is_file() else None
    if given is None:
        return None
    path = folder / "checkpoints" / f"{given}.ckpt" if given in ("last", "best") else Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: with ckpt_path={given} name the run's folder, hydra.run.dir=<run folder>")
    try:
        read_checkpoint(path)
    except ValueError as error:
        if not previous(path).is_file():
            raise
        read_checkpoint(previous(path))
        record.console.print(f"{error}\nresuming from the one before it, {previous(path)}", markup=False)
        return previous(path)
    return path


def _card(cfg: DictConfig, folder: Path, backbone: Backbone, data: PromptData) -> dict[str, Any]:
    made_of = {
        "verb": "train",
        "status": "running",
        "overrides": list(HydraConfig.get().overrides.task),
        "git": record.git_commit(),
        "versions": record.versions(),
        "backbone": backbone.source,
        "tuned_fraction": cfg.tuned_fraction,
        "config": build.plain(cfg),
        "splits": {name: {"prompts": len(texts), "first": texts[:1]} for name, texts in data.splits.items()},
    }
    return record.redacted(made_of)


def _summary(cfg: DictConfig, folder: Path, module: LightningModule, data: PromptData, trainer: Trainer) -> dict[str, Any]:
    names = set(trainable_names(module))
    count = sum(parameter.numel() for name, parameter in module.named_parameters() if name in names)
    rewards = ", ".join(f"{reward.weight:g} x {name}" for name, reward in module.reward.rewards.items())
    constraint = module.constraint.rewards["constraint"] if module.constraint else None
    kind = cfg.constraint.constraint._target_.rsplit(".", 1)[-1] if constraint else ""
    kept = {"prefix": f"{module.first_gradient_step} steps read from {cfg.cache.dir} where kept"} if cfg.cache.dir else {}
    return {
        "learns": f"text_encoder {cfg.tune.text_encoder}, unet {cfg.tune.unet}: {count:,} parameters in {len(names)} tensors",
        "rewards": rewards,
        "constraint": f"{constraint.weight:g} x {kind}" if constraint else "none",
        "steps": f"{cfg.max_steps} of batch {data.batch_size} x {trainer.world_size} = "
        f"{_samples(cfg.max_steps, module, trainer, data):,} samples",
        "chain": f"{cfg.chain.steps} DDIM steps at guidance {cfg.chain.guidance_scale:g}",
        "UNet calls": _calls(cfg, module),
        **kept,
        "prompts": ", ".join(f"{len(texts)} {name}" for name, texts in data.splits.items()),
        "device": str(trainer.strategy.root_device),
        "run folder": str(folder),
    }


def _calls(cfg: DictConfig, module: LightningModule) -> str:
    name = type(getattr(module, "schedule", module)).__name__
    cost = _unet_cost(cfg, module)
    return f"{cost['forwards']:g} forwards and {cost['backwards']:g} backwards a sample ({name})"


def _unet_cost(cfg: DictConfig, module: LightningModule) -> dict[str, float]:
    """Evaluations of the UNet for a training sample, in rows: guidance makes two of each; means where a schedule draws."""
    rows = 1 if cfg.chain.guidance_scale == 1 else 2
    return {name: rows * number for name, number in zip(("forwards", "backwards"), module.cost(), strict=True)}


def _samples(steps: int, module: LightningModule, trainer: Trainer, data: PromptData) -> int:
    prompts = steps * data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
    return round(prompts * getattr(module, "images_per_prompt", 1))


def _fit(
    trainer: Trainer,
    module: LightningModule,
    data: PromptData,
    checkpoint: Path | None,
    folder: Path,
    card: dict[str, Any],
) -> dict[str, Any]:
    began = time.monotonic()
    status = "failed"
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, RankWatch))
    watch.lost = lambda message: _say_lost(trainer, folder, card, message)
    try:
        # Lightning turns Ctrl-C into SystemExit(1): what must happen all the same stands in `finally`.
        trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
        status = "finished"
    except (KeyboardInterrupt, SystemExit) as stop:
        status = "interrupted"
        if isinstance(stop, SystemExit) and not stop.code:  # Lightning's at SIGTERM: a run cut short is no success
            raise SystemExit(1) from stop
        raise
    except Exception as error:
        known = watch.explained(trainer, error) or error
        if is_out_of_memory(error):
            known = MemoryError(memory_advice(error, module, trainer, card["config"].get("reward_dtype")))
        card["error"] = str(known) or type(known).__name__
        if known is error:
            raise
        raise known from error
    finally:
        if trainer.is_global_zero:
            # where a full disk ended the run, its record may not fit either: the error that came first is told
            with contextlib.nullcontext() if status == "finished" else contextlib.suppress(OSError):
                _finish(trainer, module, folder, card, status, time.monotonic() - began)
    return card


def _say_lost(trainer: Trainer, folder: Path, card: dict[str, Any], message: str) -> None:
    """At once: this process may hang in a collective, and is then ended from a thread."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if trainer.is_global_zero:
        record.write_record(folder, card | {"status": "failed", "error": message})
        _say_resume(folder, "failed")


def _finish(trainer: Trainer, module: LightningModule, folder: Path, card: dict[str, Any], status: str, seconds: float) -> None:
    scores = next((callback for callback in trainer.callbacks if isinstance(callback, BeforeAfter)), None)
    steps = trainer.global_step
    samples = _samples(steps, module, trainer, trainer.datamodule)
    card |= {"status": status, "seconds": round(seconds, 1), "samples": samples, "steps": steps}
    card["skipped_steps"] = next(callback.skipped for callback in trainer.callbacks if isinstance(callback, Guard))
    dev = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(("val/", "watch/"))}
    card |= {"dev": dev, "samples_shown": _shown(trainer), "device": str(trainer.strategy.root_device)}
    if objective := card["config"].get("objective"):
        card["objective"] = dev.get(objective)
    if status != "finished":
        record.write_record(folder, card)  # how it ended, whatever happens below
    card["metrics"] = scores.metrics() if scores else {}
    if status == "finished":
        export_tuned(module.backbone, folder)
        if scores and scores.scores.rows:
            scores.scores.save(folder / "scores.csv")
    if getattr(module, "prefix", None) is not None:
        card["prefix"] = module.prefix.record()
    record.write_record(folder, card)
    if status == "finished":
        _say_result(folder, scores)
    else:
        _say_resume(folder, status)


def _shown(trainer: Trainer) -> list[str]:
    grids = next((callback for callback in trainer.callbacks if isinstance(callback, SampleGrid)), None)
    return grids.texts(trainer) if grids else []


def export_tuned(backbone: Backbone, folder: Path) -> None:
    """Write text_encoder/ and unet/ as far as they were tuned, for from_pretrained; LoRA adapters go to lora/."""
    for part, mode in backbone.modes.items():
        model = getattr(backbone, part)
        if mode == "full":
            save_model(model, folder / part)
        elif mode == "lora":
            backbone.save_lora(part, folder / "lora" / part)


def _say_result(folder: Path, scores: BeforeAfter | None) -> None:
    if scores and len(scores.scores.models) == 2:
        table = record.Table("score", "before", "after", "after - before, 95 %", title="held-out prompts, same seeds")
        for name in scores.scores.rewards:
            before, after = (f"{scores.scores.column(model, name).mean():.4f}" for model in ("before", "after"))
            table.add_row(name, before, after, str(scores.scores.paired(name, "before", "after")))
        record.console.print(table)
    record.console.print(f"\nrun folder  {folder}\npicture     {folder / 'samples' / 'before_after.png'}")
    record.console.print(f"""next        python -m tc_lightning generate run={folder} text='["a red circle on the left"]'""")


def _say_resume(folder: Path, status: str) -> None:
    given = [word for word in sys.argv[2:] if not word.startswith(("ckpt_path=", "hydra.run.dir="))]
    last = folder / "checkpoints" / "last.ckpt"
    record.console.print(f"\n{status}; run folder {folder}")
    if last.exists():
        command = shlex.join([*given, f"hydra.run.dir={folder}", "ckpt_path=last"])
        record.console.print(f"resume      python -m tc_lightning train {command}", markup=False)
    else:
        record.console.print("no checkpoint was written yet: start it again")
