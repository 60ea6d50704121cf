"""The models that evaluate compares: what run= names, each with settings of its own where it has some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from tc_lightning.backbone import ORIGINAL, Backbone, located
from tc_lightning.cli.generate import _device, trained_settings
from tc_lightning.model_card import record_of
from tc_lightning.sampling import Sampler

CHAIN = ("steps", "guidance_scale", "timestep_spacing", "scheduler")
SETTINGS = (*CHAIN, "tuned_fraction")


@dataclass(frozen=True)
class Entry:
    """One model of run=: where it is, what it is called, and how it is sampled unlike the others."""

    source: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    rewritten: bool = False  # told prompts of rewriter=, scored against the prompts as they are

    @property
    def is_run(self) -> bool:
        """Whether it knows what it was tuned from: a run folder, or an export that carries the original text encoder."""
        return (located(self.source) / "run.json").is_file() or (located(self.source) / ORIGINAL).is_dir()

    def plain(self) -> Any:
        """As it is written down."""
        return {"run": self.source, **self.settings} if self.settings else self.source


def entries(cfg: DictConfig) -> list[Entry]:
    """The models of run= in their order, under names that differ.

    Raises:
        ValueError: none, a key that an entry does not take, another number of names, or base without a run folder.
    """
    given = list(cfg.run) if isinstance(cfg.run, ListConfig) else [cfg.run]
    if not given:
        raise ValueError("run=[] names no model")
    found = [_entry(value) for value in given]
    names = [entry.name for entry in found] if cfg.names is None else [str(name) for name in cfg.names]
    if len(names) != len(found):
        raise ValueError(f"{len(names)} names for {len(found)} models: names= takes one a model of run=")
    names = [name if names.index(name) == i else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
    found = [Entry(entry.source, name, entry.settings) for entry, name in zip(found, names, strict=True)]
    if any(entry.source == "base" for entry in found) and not any(entry.is_run for entry in found):
        raise ValueError("run=base is what a run started from: name a run folder too, run='[base,<run folder>]'")
    kind = HydraConfig.get().runtime.choices.get("rewriter") if cfg.get("rewriter") else None
    return [*found, *(replace(entry, name=f"{entry.name} + {kind}", rewritten=True) for entry in found if kind)]


def _entry(value: Any) -> Entry:
    if not isinstance(value, DictConfig):
        return Entry(str(value), Path(str(value)).name)
    words = OmegaConf.to_container(value, resolve=True)
    odd = [key for key in words if key not in ("run", "name", *SETTINGS)]
    if odd or not words.get("run"):
        what = f"{odd[0]} in" if odd else "no run in"
        raise ValueError(f"{what} an entry of run=: accepted are run (required), name, {', '.join(SETTINGS)}")
    source = str(words.pop("run"))
    return Entry(source, str(words.pop("name", Path(source).name)), words)


def loaders(found: list[Entry], cfg: DictConfig) -> dict[str, Callable[[], Sampler]]:
    """Name -> a function that loads the model as it is tested."""
    first = next((entry.source for entry in found if entry.is_run), None)
    rewriter = instantiate(cfg.rewriter) if any(entry.rewritten for entry in found) else None
    return {entry.name: _loader(entry, first, cfg, rewriter if entry.rewritten else None) for entry in found}


def _loader(entry: Entry, first: str | None, cfg: DictConfig, rewriter: Callable[..., list[str]] | None) -> Callable[[], Sampler]:
    asked = {key: cfg.tuned_fraction if key == "tuned_fraction" else cfg.chain[key] for key in SETTINGS} | entry.settings
    asked = {key: value for key, value in asked.items() if value is not None}

    def load() -> Sampler:
        device, base = _device(cfg.device), entry.source == "base"
        source = first if base else entry.source
        backbone = Backbone.load(source)
        settings = {key: value for key, value in trained_settings(source, backbone).items() if key in SETTINGS} | asked
        original = None
        if base:
            backbone = Backbone.load(**backbone.base_record)
        elif backbone.base_record is not None:
            original = backbone.original_text_encoder().to(device)
        if original is None:
            settings["tuned_fraction"] = 1.0
        return Sampler(backbone.to(device), **settings, original=original, rewriter=rewriter)

    return load


def trained_on(found: list[Entry]) -> dict[str, list[str]]:
    """What each run's record says it was trained on, the constraint included."""
    names = {}
    for entry in found:
        if not entry.is_run:
            continue
        config = record_of(located(entry.source)).get("config", {})
        held = (config.get("constraint") or {}).get("constraint") or {}
        constraint = [held["_target_"].rsplit(".", 1)[-1]] if "_target_" in held else []
        names[entry.name] = [*(config.get("reward") or {}), *constraint]
    return names
