"""Prompt engineering, the baseline that changes the prompt and not the model: list of prompts -> list of prompts.

A rewriter is a pure function of each prompt: neither the batch, nor the order, nor a random state plays a part. Images of
rewritten prompts are scored against the prompts as they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tc_lightning.noise import derive_seed

Rewriter = Callable[[Sequence[str]], list[str]]
MODIFIERS = ("highly detailed", "sharp focus", "vivid colors", "masterpiece", "trending on artstation")


@dataclass(frozen=True)
class Modifiers:
    """Appends (or puts in front) the same words to every prompt, as practitioners do (Oppenlaender 2022).

    Raises:
        ValueError: no words.
    """

    words: Sequence[str] = MODIFIERS
    front: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not self.words:
            raise ValueError(f"rewriter.words={self.words!r}: accepted is a list of words, at least one")
        object.__setattr__(self, "words", tuple(str(word) for word in self.words))

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        added = ", ".join(self.words)
        return [f"{added}, {prompt}" if self.front else f"{prompt}, {added}" for prompt in prompts]


@dataclass
class LanguageModel:
    """Continues every prompt with a causal language model (the paper's baseline is GPT-2 `daspartho/prompt-extend`).

    Promptist (Hao et al. 2023) is `checkpoint="microsoft/Promptist", tokenizer="gpt2", template="{prompt} Rephrase:",
    keep_prompt=False, beams=8, temperature=0`.

    Args:
        checkpoint: hub id or folder of any causal language model.
        tokenizer: hub id or folder; the checkpoint's own by default.
        revision: hub commit, tag or branch.
        template: what the model is given, with {prompt} in it.
        keep_prompt: the result begins with the prompt; otherwise it is what the model wrote.
        max_new_tokens: at most so many are written.
        temperature: 0 takes the likeliest word each time; above, words are drawn with a seed made of `seed` and the prompt.
        beams: of the search at temperature 0.
        seed: of the draws.

    Raises:
        ValueError: numbers out of range, a template without {prompt}, or a model that cannot be loaded.
    """

    checkpoint: str | Path = "daspartho/prompt-extend"
    tokenizer: str | Path | None = None
    revision: str | None = None
    template: str = "{prompt}"
    keep_prompt: bool = True
    max_new_tokens: int = 40
    temperature: float = 0.9
    beams: int = 1
    seed: int = 0
    device: str | torch.device = "cpu"
    _known: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template:
            raise ValueError(f"rewriter.template={self.template!r}: accepted is a text with {{prompt}} in it")
        if self.max_new_tokens < 1 or self.temperature < 0 or self.beams < 1:
            numbers = f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, beams={self.beams}"
            raise ValueError(f"rewriter: {numbers}: accepted: at least 1, 0 and 1")
        self._tokenizer, self._model = self._load()

    def _load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options = {"revision": self.revision} if self.revision else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer or self.checkpoint), **options)
            model = AutoModelForCausalLM.from_pretrained(str(self.checkpoint), dtype=torch.float32, use_safetensors=None, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"could not load the language model {self.checkpoint}: {str(error).splitlines()[0]}; without network give a "
                "folder with rewriter.checkpoint=<folder>, or take rewriter=modifiers"
            ) from error
        return tokenizer, model.to(self.device).eval().requires_grad_(False)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        for prompt in prompts:
            if prompt not in self._known:
                self._known[prompt] = self._write(prompt)
        return [self._known[prompt] for prompt in prompts]

    def _write(self, prompt: str) -> str:
        given = self._tokenizer(self.template.replace("{prompt}", prompt), return_tensors="pt").to(self.device)
        given = {name: given[name] for name in ("input_ids", "attention_mask") if name in given}
        end = self._tokenizer.eos_token_id
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "pad_token_id": end if end is not None else 0}
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": float(self.temperature)}
        else:
            options |= {"do_sample": False, "num_beams": self.beams}
        # generate draws from torch's own random state: it is set for this prompt and put back
        with torch.random.fork_rng(devices=[self.device] if "cuda" in str(self.device) else []):
            torch.manual_seed(derive_seed(self.seed, 51, *prompt.encode()))
            written = self._model.generate(**given, **options)[0, given["input_ids"].shape[1] :]
        text = " ".join(self._tokenizer.decode(written, skip_special_tokens=True).split())
        if not self.keep_prompt:
            return text or prompt
        glue = "" if not text or text[0] in ",.;:" else " "
        return f"{prompt}{glue}{text}"
