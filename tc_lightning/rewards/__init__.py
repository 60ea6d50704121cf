"""Rewards: differentiable image scores, and their weighted sum. Names are imported on first use, so this package stays light."""

import importlib

_HOMES = {
    "Reward": "base",
    "BoundReward": "base",
    "FunctionReward": "base",
    "RewardMix": "mix",
    "CLIPScore": "clip",
    "PickScore": "pickscore",
    "Aesthetic": "aesthetic",
    "HPSv2": "hpsv2",
    "CLIPTunedScore": "clip_tuned",
    "ImageReward": "imagereward",
    "Oracle": "oracle",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name == "tiny":  # the embedded model's own: tc.rewards.tiny.tiny_clip
        return importlib.import_module(f"{__name__}.tiny")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
