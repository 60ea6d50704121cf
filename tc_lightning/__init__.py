"""tc_lightning: fine-tune text-to-image models against rewards. Public names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "backbone",
    "Chain": "chain",
    "DDPO": "ddpo",
    "DRTune": "schedules",
    "Direct": "direct",
    "FullChain": "schedules",
    "LastK": "schedules",
    "LowVariance": "schedules",
    "PromptData": "prompts",
    "RandomK": "schedules",
    "Reward": "rewards.base",
    "RewardMix": "rewards.mix",
    "Scores": "report",
    "SingleStep": "schedules",
    "StepList": "schedules",
    "TextCraftor": "module",
    "TunedWindow": "window",
    "callback_on_step_end": "window",
    "generate": "sampling",
    "mix": "mixing",
    "rewards": "",
}
__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    from tc_lightning import rewards
    from tc_lightning.backbone import Backbone
    from tc_lightning.chain import Chain
    from tc_lightning.ddpo import DDPO
    from tc_lightning.direct import Direct
    from tc_lightning.mixing import mix
    from tc_lightning.module import TextCraftor
    from tc_lightning.prompts import PromptData
    from tc_lightning.report import Scores
    from tc_lightning.rewards.base import Reward
    from tc_lightning.rewards.mix import RewardMix
    from tc_lightning.sampling import generate
    from tc_lightning.schedules import DRTune, FullChain, LastK, LowVariance, RandomK, SingleStep, StepList
    from tc_lightning.window import TunedWindow, callback_on_step_end


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tc_lightning' has no attribute {name!r}; it has {', '.join(__all__)}")
    if not _HOMES[name]:
        return importlib.import_module(f"tc_lightning.{name}")
    return getattr(importlib.import_module(f"tc_lightning.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
