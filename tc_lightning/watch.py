"""Is the reward being hacked? Scores that are not trained on, diversity, drift and saturation, measured while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn

from tc_lightning.measures import diversity, saturation, text_drift
from tc_lightning.prompts import fixed_seed
from tc_lightning.scoring import find_tower

ACTIONS = ("warn", "stop")


class HackingWatch(Callback):
    """Warns or stops when a held-out score falls while the trained one rises, and keeps the best weights by the held-out score.

    Dev prompts with fixed seeds are sampled as at test time, at the start, every `every` steps and at the end. Logged:
    watch/held, watch/trained, watch/drop (below held's best), watch/diversity (mean pairwise CLIP distance of a prompt's
    images), watch/saturation, watch/text_drift. Weights that beat all before, the original's included, go to
    checkpoints/best_held.ckpt.

    Args:
        held: a score that is not trained on: a name of watch=..., such as the embedded model's oracle.
        margin: how far held may fall below its best, in its own units.
        trained: the score that is climbed; "total" is the rewards' weighted sum.
        action: "warn" once, or "stop" the run after the step.
        every: steps between measures.
        prompts: how many of the dev prompts.
        seeds: images a prompt, at least 2.
        batch_size: images a batch.

    Raises:
        ValueError: numbers out of range; when training starts, no dev prompt, or a score that the run does not have or
            trains on.
    """

    def __init__(
        self,
        held: str = "oracle",
        margin: float = 0.05,
        trained: str = "total",
        action: str = "warn",
        every: int = 50,
        prompts: int = 16,
        seeds: int = 2,
        batch_size: int = 32,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"action={action!r}, accepted: {', '.join(ACTIONS)}")
        if margin < 0 or every < 1 or prompts < 1 or seeds < 2 or batch_size < 1:
            numbers = f"margin={margin}, every={every}, prompts={prompts}, seeds={seeds}, batch_size={batch_size}"
            raise ValueError(f"HackingWatch({numbers}): accepted: at least 0, 1, 1, 2 and 1")
        self.held, self.margin, self.trained, self.action = held, margin, trained, action
        self.every, self.prompts, self.seeds, self.batch_size = every, prompts, seeds, batch_size
        self.best: dict[str, float] = {}  # held, trained, step
        self.alarms: list[int] = []
        self._measured = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the scores start, unless a checkpoint brought that."""
        climbed = {"total", *pl_module.reward.rewards, *(["constraint"] if pl_module.constraint is not None else [])}
        known = [*climbed, *(pl_module.watch.rewards if pl_module.watch is not None else [])]
        if self.held in climbed or self.held not in known or self.trained not in climbed:
            held = ", ".join(name for name in known if name not in climbed) or "none (watch=... adds some)"
            raise ValueError(
                f"HackingWatch(held={self.held}, trained={self.trained}): held may be {held}, trained {', '.join(sorted(climbed))}"
            )
        if not trainer.datamodule.splits["dev"]:
            raise ValueError("HackingWatch needs dev prompts: val.prompts=...")
        if not self.best:
            self._look(trainer, pl_module)
        self._measured = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """A measure every so many steps."""
        if trainer.global_step % self.every == 0 and trainer.global_step > self._measured:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last measure."""
        if trainer.global_step > self._measured:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        self._measured = trainer.global_step
        # every process measures the same images; one of them decides, lest a last digit part them
        found = trainer.strategy.broadcast(self.measure(trainer.datamodule.splits["dev"], module))
        now = {"held": found["held"], "trained": found["trained"], "step": trainer.global_step}
        best = self.best or now
        found["drop"] = max(0.0, best["held"] - now["held"])
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"watch/{name}": value for name, value in found.items()}, trainer.global_step)
        if not self.best or now["held"] > best["held"]:
            first, self.best = not self.best, now
            if not first:
                trainer.save_checkpoint(self._file(trainer))
        elif found["drop"] > self.margin and now["trained"] > best["trained"]:
            self._alarm(trainer, now)

    @torch.no_grad()
    def measure(self, prompts: list[str], module: LightningModule) -> dict[str, float]:
        """held, trained, diversity (where a reward has a CLIP), saturation, text_drift of the module as it is now."""
        prompts = prompts[: self.prompts]
        rows = [(text, fixed_seed(2_000_000 + i * self.seeds + k)) for i, text in enumerate(prompts) for k in range(self.seeds)]
        scores: list[dict[str, torch.Tensor]] = []
        images = []
        for start in range(0, len(rows), self.batch_size):
            texts, seeds = (list(part) for part in zip(*rows[start : start + self.batch_size], strict=True))
            images.append(module.sample(texts, seeds))
            scores.append(module.score(images[-1], texts))
        means = {name: float(torch.cat([part[name].float() for part in scores]).mean()) for name in (self.held, self.trained)}
        found = {"held": means[self.held], "trained": means[self.trained]}
        tower = find_tower(module)
        if tower is not None:
            embeds = torch.cat([tower.image_embeds(part) for part in images]).split(self.seeds)
            found["diversity"] = float(torch.stack([diversity(part).mean() for part in embeds]).mean())
        found["saturation"] = float(torch.cat([saturation(part) for part in images]).mean())
        if module.original is not None:
            encode = module.backbone.encode
            found["text_drift"] = float(text_drift(encode(prompts), encode(prompts, module.original)).mean())
        return found

    def _alarm(self, trainer: Trainer, now: dict[str, float]) -> None:
        if not self.alarms:
            file = self._file(trainer)
            kept = f"the best weights are in {file}" if file.exists() else "no weights were better than the original's"
            rank_zero_warn(
                f"step {now['step']}: held-out {self.held} is {now['held']:.4g}, from {self.best['held']:.4g} at step "
                f"{self.best['step']}, while {self.trained} rose from {self.best['trained']:.4g} to {now['trained']:.4g}: "
                f"the reward is being hacked; {kept}" + ("; the run stops" if self.action == "stop" else "")
            )
        self.alarms.append(int(now["step"]))
        if self.action == "stop":
            trainer.should_stop = True

    def _file(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" / "best_held.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best so far and the alarms."""
        return {"best": self.best, "alarms": self.alarms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.alarms = dict(state_dict["best"]), list(state_dict["alarms"])
