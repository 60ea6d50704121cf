"""From composed settings to plain objects: the only place where both are seen."""

from __future__ import annotations

import csv
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

from tc_lightning.backbone import Backbone, quiet_loading
from tc_lightning.callbacks import CleanStop, checkpoints
from tc_lightning.checkpoint_io import VerifiedCheckpointIO, read_checkpoint
from tc_lightning.cli.record import git_commit, redacted
from tc_lightning.guard import Guard
from tc_lightning.precision import set_matmul, speed_up
from tc_lightning.prefix import PrefixCache
from tc_lightning.prompts import PromptData
from tc_lightning.ranks import RankWatch
from tc_lightning.rewards.mix import RewardMix


def mix_of(group: DictConfig | None, key: str) -> RewardMix | None:
    """A RewardMix of a multi-select group, None where it is empty.

    Raises:
        ValueError: a name with a weight but no class, as is left when an experiment sets the weight of a reward that was
            not chosen.
    """
    named = OmegaConf.to_container(group, resolve=True) if group else {}
    orphans = [name for name, value in named.items() if not isinstance(value, dict) or "_target_" not in value]
    if orphans:
        raise ValueError(
            f"{key}.{orphans[0]} is set but {key}={orphans[0]} is not chosen: add it to {key}=[...] or drop that setting"
        )
    return RewardMix({name: instantiate(value) for name, value in named.items()}) if named else None


# key: the least value that makes sense; of whole numbers
COUNTS = {
    "seed": None,
    "max_steps": 1,
    "checkpoint_every": 0,
    "val.prompts": 0,
    "val.every": 0,
    "chain.steps": 1,
    "tune.rank": 1,
    "guard.nonfinite_steps": 1,
    "prompts.batch_size": 1,
    "prompts.seeds_per_prompt": 1,
    "prompts.workers": 0,
    "prompts.train": 1,
    "prompts.heldout": 0,
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1,
}
ALWAYS = ("seed", "max_steps", "chain.steps", "chain.guidance_scale", "tuned_fraction", "optimizer.lr")
# and of any numbers
NUMBERS = dict.fromkeys(
    ("chain.guidance_scale", "tuned_fraction", "optimizer.lr", "optimizer.weight_decay", "trainer.gradient_clip_val"), 0
)


def check_numbers(cfg: DictConfig) -> None:
    """Refuse a word where a number belongs, and numbers that are too small, before anything is loaded.

    Raises:
        ValueError: names the key.
    """
    for table, kinds, what in ((COUNTS, int, "a whole number"), (NUMBERS, int | float, "a number")):
        for key, least in table.items():
            value = OmegaConf.select(cfg, key, throw_on_missing=True)
            if value is None and key not in ALWAYS:
                continue  # a group without this key, or one of Lightning's that is off
            if isinstance(value, bool) or not isinstance(value, kinds) or (least is not None and not value >= least):
                raise ValueError(f"{key}={value}: accepted is {what}" + ("" if least is None else f", at least {least}"))


def build_backbone(cfg: DictConfig) -> Backbone:
    """The model, with what learns switched on.

    Raises:
        ValueError: stage=unet without a tuned text encoder, or with one that learns.
    """
    if cfg.get("stage") not in (None, "unet"):
        raise ValueError(f"stage={cfg.stage}: accepted are null and unet")
    if cfg.get("stage") and (not cfg.backbone.get("text_encoder") or cfg.tune.text_encoder != "frozen"):
        raise ValueError(
            "the UNet stage trains on the frozen text encoder of a finished text run: backbone.text_encoder=<run folder> "
            f"tune.text_encoder=frozen (now {cfg.backbone.get('text_encoder')}, {cfg.tune.text_encoder})"
        )
    set_matmul(cfg.matmul)
    backbone = instantiate(cfg.backbone)
    speed_up(backbone.unet, backbone.vae, cfg.compile, cfg.channels_last)
    return backbone.tune(**cfg.tune, seed=cfg.seed)


def build_method(cfg: DictConfig, backbone: Backbone) -> LightningModule:
    """The method over the backbone, rewards, constraint and schedule."""
    reward = mix_of(cfg.get("reward"), "reward")
    if reward is None:
        raise ValueError("no reward: reward=[...] takes one or more names, `train --help` lists them")
    constraint = instantiate(cfg.constraint.constraint) if cfg.get("constraint") else None
    parts = {
        "backbone": backbone,
        "reward": reward,
        "constraint": constraint,
        "watch": mix_of(cfg.get("watch"), "watch"),
        "schedule": instantiate(cfg.schedule),
        "regularizers": {name: instantiate(value) for name, value in (cfg.get("regularizer") or {}).items()},
        "prefix": build_prefix(cfg),
        "optimizer": instantiate(cfg.optimizer),
        "lr_scheduler": instantiate(cfg.lr_scheduler) if cfg.get("lr_scheduler") else None,
    }
    # a partial first: Hydra would turn a schedule, being a dataclass, into a config
    make = instantiate(cfg.method, _partial_=True)
    taken = inspect.signature(make.func).parameters
    if parts["regularizers"] and "regularizers" not in taken:
        name = make.func.__name__
        raise ValueError(
            f"{name} takes no regularizer (regularizer=[{', '.join(parts['regularizers'])}]): drop it, or method=textcraftor"
        )
    return make(**{name: part for name, part in parts.items() if name in taken})


def build_prefix(cfg: DictConfig) -> PrefixCache | None:
    """What keeps the steps before the gradient, None where cache.dir names no folder.

    Raises:
        ValueError: the method has no steps that stay the same.
    """
    if cfg.cache.dir is None:
        return None
    method = get_class(cfg.method._target_)
    if "prefix" not in inspect.signature(method).parameters:
        raise ValueError(
            f"cache.dir keeps steps that do not change while the run learns, and {method.__name__} has none: it samples with the "
            "weights of the moment. cache.dir=null"
        )
    return PrefixCache(**cfg.cache)


def build_data(cfg: DictConfig, backbone: Backbone) -> PromptData:
    """Prompts in their splits; says once how many the tokenizer cuts."""
    data = instantiate(cfg.prompts)
    data.warn_about_length(backbone.token_counts, backbone.tokenizer.model_max_length)
    return data


def build_trainer(cfg: DictConfig, folder: Path, checkpoint: Path | None = None, steps_itself: bool = False) -> Trainer:
    """Lightning's Trainer with loggers, callbacks and checkpoints that write into the run folder.

    A method that steps its optimizer itself (DDPO) clips the gradient itself too and takes one batch a step.
    """
    if steps_itself and cfg.trainer.get("accumulate_grad_batches", 1) != 1:
        raise ValueError(
            "this method steps its optimizer itself: trainer.accumulate_grad_batches=1, and a larger prompts.batch_size"
        )
    own_steps = {"gradient_clip_val": None} if steps_itself else {}
    loggers = build_loggers(cfg, checkpoint)
    callbacks = [instantiate(value) for value in (cfg.get("callbacks") or {}).values()]
    monitor = "val/total" if cfg.val.prompts and cfg.val.every and cfg.val.every <= cfg.max_steps else None
    saving = checkpoints(folder / "checkpoints", cfg.checkpoint_every, monitor)
    batches = cfg.val.every * cfg.trainer.get("accumulate_grad_batches", 1)
    validation = {"val_check_interval": batches, "check_val_every_n_epoch": None} if monitor else {"limit_val_batches": 0}
    torch.manual_seed(cfg.seed)
    return instantiate(
        cfg.trainer,
        max_steps=cfg.max_steps,
        default_root_dir=str(folder),
        logger=loggers or False,
        callbacks=[*callbacks, Guard(cfg.guard.nonfinite_steps), *saving, CleanStop(), RankWatch()],
        plugins=[VerifiedCheckpointIO()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **validation,
        **own_steps,
    )


def build_loggers(cfg: DictConfig, checkpoint: Path | None) -> list[Logger]:
    """The chosen loggers; in a resumed run Lightning's csv logger would begin a new file: the rows so far are put back."""
    loggers = [instantiate(value) for value in (cfg.get("logger") or {}).values()]
    for logger in loggers:
        if checkpoint is not None and isinstance(logger, CSVLogger) and rank_zero_only.rank == 0:
            file = Path(logger.log_dir) / "metrics.csv"
            step = read_checkpoint(checkpoint)["global_step"]
            _keep_rows(logger, file, step) if file.is_file() else None
        if not isinstance(logger, CSVLogger):  # beside a csv file lies run.json, which has all this
            made_of = {**plain(cfg), "git": git_commit(), "overrides": list(HydraConfig.get().overrides.task)}
            logger.log_hyperparams(redacted(made_of))
    return loggers


def _keep_rows(logger: CSVLogger, file: Path, before_step: int) -> None:
    with file.open(newline="", encoding="utf-8") as opened:
        table = csv.DictReader(opened)
        names, rows = list(table.fieldnames or []), [row for row in table if int(row["step"]) < before_step]
    writer = logger.experiment  # made here, which deletes the file
    writer.metrics_keys = names
    with file.open("w", newline="", encoding="utf-8") as opened:
        kept = csv.DictWriter(opened, names)
        kept.writeheader()
        kept.writerows(rows)


def quiet() -> None:
    """Silence what other libraries print about small matters: bars for loading, advice that does not fit short strings."""
    quiet_loading()
    for about in (
        "num_workers",
        "tensorboardX",
        "Checkpoint directory",
        "LeafSpec",
        "dataloader is not resumable",
        "GPU available",
        "Experiment logs directory",
        "in eval mode at the start of training",
        "smaller than the logging interval",
    ):
        warnings.filterwarnings("ignore", message=f".*{about}.*")
    if rank_zero_only.rank:  # the first process says it for all
        warnings.simplefilter("ignore")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric.utilities.distributed").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # five lines of retries before our one


def plain(value: Any) -> dict[str, Any]:
    """A config as plain data with everything resolved."""
    return OmegaConf.to_container(value, resolve=True)
