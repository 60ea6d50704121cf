"""A tuned text encoder in any Stable Diffusion pipeline of diffusers, in the window of time in which it is to speak.

diffusers calls back when a step has ended: what is set there is seen from the next step on. The first step's embeddings
are therefore handed in with the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tc_lightning.conditioning import guidance_pair, tuned_from

StepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def callback_on_step_end(prompt_embeds: Tensor, null_embeds: Tensor, tuned_fraction: float = 0.6) -> StepEnd:
    """The argument `callback_on_step_end` of a diffusers pipeline: tuned embeddings from t < 1000 * tuned_fraction on.

    It goes by the times of the pipeline's own scheduler, so any scheduler, any number of steps and any strength will do.

    Args:
        prompt_embeds: [B, L, D] of the tuned text encoder, a row an image.
        null_embeds: [1 or B, L, D] of the tuned text encoder for the negative prompt; without guidance it plays no part.
        tuned_fraction: 0.6 is the paper's 15 of 25 steps.
    """
    tuned_from([], tuned_fraction)

    def switch(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        times = pipe.scheduler.timesteps
        times = times[len(times) - pipe.num_timesteps :].tolist()  # image-to-image leaves out the first ones
        if step + 1 >= tuned_from(times, tuned_fraction, pipe.scheduler.config.num_train_timesteps):
            guided = pipe.do_classifier_free_guidance
            kwargs["prompt_embeds"] = guidance_pair(null_embeds, prompt_embeds) if guided else prompt_embeds
        return kwargs

    return switch


class TunedWindow:
    """Makes the arguments with which a diffusers pipeline uses its own text encoder first and a tuned one afterwards.

    Args:
        pipe: StableDiffusionPipeline, or its image-to-image, inpainting or ControlNet kind, with the original text encoder.
        text_encoder: the tuned one, for example `CLIPTextModel.from_pretrained("<run folder>/text_encoder")`.
        tuned_fraction: the tuned text is used where t < 1000 * tuned_fraction.

    Example:
        window = TunedWindow(pipe, tuned, tuned_fraction=0.6)
        images = pipe(**window("a red circle", num_inference_steps=25), guidance_scale=7.5).images
        images = image_to_image(**TunedWindow(image_to_image, tuned)("a red circle", strength=0.5), image=image).images
    """

    def __init__(self, pipe: Any, text_encoder: nn.Module, tuned_fraction: float = 0.6) -> None:
        tuned_from([], tuned_fraction)
        mine, theirs = (encoder.config.hidden_size for encoder in (pipe.text_encoder, text_encoder))
        if mine != theirs:
            raise ValueError(f"the tuned text encoder's width is {theirs}, the pipeline's is {mine}")
        self.pipe, self.text_encoder, self.tuned_fraction = pipe, text_encoder, tuned_fraction

    def __call__(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] = "",
        num_inference_steps: int = 50,
        strength: float | None = None,
        num_images_per_prompt: int = 1,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call; its others (guidance_scale, generator, image, ...) stay yours.

        Args:
            prompts, negative_prompts: a text, or a list of them.
            num_inference_steps, strength, num_images_per_prompt: as in the pipeline, into whose arguments they go.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative_prompts] * len(prompts) if isinstance(negative_prompts, str) else list(negative_prompts)
        arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
        default = inspect.signature(type(self.pipe).__call__).parameters.get("strength")
        if default is not None:
            arguments["strength"] = default.default if strength is None else strength
        elif strength is not None:
            raise ValueError(f"{type(self.pipe).__name__} takes no strength")
        tuned, tuned_null = (self._encode(texts, self.text_encoder) for texts in (prompts, negatives))
        window = tuned_from(self._times(num_inference_steps, arguments.get("strength")), self.tuned_fraction, self._train_times)
        first, first_null = tuned, tuned_null
        if window > 0:
            first, first_null = (self._encode(texts, self.pipe.text_encoder) for texts in (prompts, negatives))
        rows = [embeds.repeat_interleave(num_images_per_prompt, dim=0) for embeds in (tuned, tuned_null)]
        callback = callback_on_step_end(*rows, self.tuned_fraction)
        return arguments | {"prompt_embeds": first, "negative_prompt_embeds": first_null, "callback_on_step_end": callback}

    @property
    def _train_times(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps

    def _times(self, steps: int, strength: float | None) -> list[float]:
        """The times that the pipeline is going to run."""
        self.pipe.scheduler.set_timesteps(steps)
        times = self.pipe.scheduler.timesteps
        return (times if strength is None else self.pipe.get_timesteps(steps, strength, times.device)[0]).tolist()

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], text_encoder: nn.Module) -> Tensor:
        tokenizer, device = self.pipe.tokenizer, next(text_encoder.parameters()).device
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        input_ids = tokenizer(list(texts), return_tensors="pt", **options).input_ids.to(device)
        return text_encoder(input_ids).last_hidden_state.to(self.pipe.unet.device, self.pipe.unet.dtype)
