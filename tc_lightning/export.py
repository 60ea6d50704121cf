"""Tuned models in the forms that other tools load: written beside the target, read back, compared, then put in its place."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tc_lightning import lora_files, model_card, pipeline_files
from tc_lightning.backbone import Backbone, located
from tc_lightning.model_card import MARK
from tc_lightning.sampling import generate
from tc_lightning.single_file import plain_text_state

KINDS = ("diffusers", "single_file", "lora", "hub")
PARTS = ("pipeline", "text_encoder")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIFFUSERS_LORA, KOHYA_LORA = "pytorch_lora_weights.safetensors", "kohya.safetensors"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class ExportError(ValueError):
    """An export was refused or failed; what was there before is whole."""


@dataclass
class Source:
    """What is exported.

    Args:
        backbone: the tuned model, plain weights (adapters merged).
        original: the text encoder before tuning.
        run: the run's record (run.json), empty for a model that is no run.
        adapters: LoRA weights by part in PEFT's bare names, where the run has them; `alphas` are their numerators.
        base: name of the model that it was tuned from.
        folder: the run's folder, for its scores and samples.
    """

    backbone: Backbone
    original: nn.Module
    run: Mapping[str, Any] = field(default_factory=dict)
    adapters: lora_files.Adapters = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base: str = "unknown"
    folder: Path | None = None

    @classmethod
    def load(cls, source: str | Path) -> Source:
        """A run folder, or any model that `Backbone.load` takes.

        Raises:
            BackboneError: not found, or it does not fit.
        """
        backbone, folder = Backbone.load(source), located(source)
        original = backbone.original_text_encoder() or backbone.text_encoder
        run = model_card.record_of(folder)
        found = [part for part in ("text_encoder", "unet") if (folder / "lora" / part).is_dir()]
        adapters = {part: load_file(folder / "lora" / part / "adapter_model.safetensors") for part in found}
        configs = {part: json.loads((folder / "lora" / part / "adapter_config.json").read_text()) for part in found}
        alphas = {part: config["lora_alpha"] for part, config in configs.items()}
        base = run.get("exported_from") or _first_base(str(backbone.source["source"]))
        return cls(backbone, original, run, adapters, alphas, configs, base, folder if run else None)


def _first_base(base: str) -> str:
    """The model that all began with, where a run started from another run."""
    file = Path(base) / "run.json"
    while file.is_file():
        base = str((json.loads(file.read_text(encoding="utf-8")).get("backbone") or {}).get("source", "unknown"))
        file = Path(base) / "run.json"
    return base


def _shown(base: str) -> str:
    """A local folder by its name alone: where it lies on this machine is nobody's business."""
    return Path(base).name if base.startswith(("/", ".", "~")) else base


@dataclass(frozen=True)
class Exported:
    """Where it lies and how far its images, read back, are from the model's: largest pixel difference in [0, 1]."""

    path: Path
    rounding: float  # of the dtype (and of a low rank): the model in fp32 against what was written
    files: tuple[str, ...]


def export(
    source: Source,
    out: str | Path,
    to: str = "diffusers",
    dtype: str = "fp32",
    part: str = "pipeline",
    lora_rank: int | None = None,
    prompt: str = "a red circle on the left",
    steps: int = 2,
    name: str | None = None,
) -> Exported:
    """Write a model for other tools; an export that was there before is replaced at the end, whole, or left alone.

    Args:
        out: folder (diffusers, lora, hub) or .safetensors file (single_file).
        to: "diffusers", "single_file" (original key layout), "lora" (PEFT, diffusers and kohya), "hub" (diffusers and a card).
        dtype: fp32, fp16 or bf16 of what is written.
        part: "pipeline", or "text_encoder" alone (of a single file: `clip_l`).
        lora_rank: for a run that tuned whole weights, approximate its change with adapters of this rank.
        prompt, steps: of the picture that is compared.

    Raises:
        ExportError: refused, not written (a full disk), or not the same when read back.
    """
    out = Path(out)
    for key, value, accepted in (("to", to, KINDS), ("dtype", dtype, tuple(DTYPES)), ("part", part, PARTS)):
        if value not in accepted:
            raise ExportError(f"{key}={value}, accepted: {', '.join(accepted)}")
    _tidy(out)
    _check_target(out, to)
    about = model_card.facts(source.run, _shown(source.base), dtype, to)
    kind, name = DTYPES[dtype], name or out.stem
    shipped = pipeline_files.rounded(source.backbone, kind, ("text_encoder",) if part == "text_encoder" else pipeline_files.MODELS)
    reference = _picture(shipped, prompt, steps)
    with _in_place_of(out) as place:
        if to == "lora":
            _write_lora(place, source, about, kind, lora_rank)
            picture = _compare_lora(source, place, reference, prompt, steps)
        else:
            writer = _write_file if to == "single_file" else _write_folder
            picture = _picture(writer(place, source, about, kind, part, name), prompt, steps)
            if not torch.equal(picture, reference):
                apart = float((picture - reference).abs().max())
                raise ExportError(f"{out} gives other images when read back (by {apart:.4g}): not kept")
    rounding = float((picture - _picture(source.backbone, prompt, steps)).abs().max())
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()) if out.is_dir() else [out.name]
    return Exported(out, rounding, tuple(files))


def _check_target(out: Path, to: str) -> None:
    if (out.suffix == ".safetensors") != (to == "single_file"):
        raise ExportError(f"out={out}: to={to} writes " + ("a .safetensors file" if to == "single_file" else "a folder"))
    if not out.exists():
        return
    if out.is_dir():
        ours = (out / MARK).is_file() or not any(out.iterdir())
    else:
        try:
            with safe_open(out, "pt") as file:
                ours = "tc_lightning" in (file.metadata() or {})
        except (OSError, SafetensorError):
            ours = False
    if not ours:
        raise ExportError(f"{out} exists and is no export of ours: it is left alone, choose another out=")


def _tidy(out: Path) -> None:
    """What an export that was killed left beside `out`: an old export takes its name again, an unfinished one goes."""
    for kind in ("old", "part"):
        for leftover in out.parent.glob(f".{kind}-*-{glob.escape(out.name)}"):
            owner = leftover.name.split("-")[1]
            if not owner.isdigit() or _is_alive(int(owner)):
                continue
            if kind == "old" and not out.exists():
                os.replace(leftover, out)
            else:
                _remove(leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """A place beside `out` to write to; only when all went well does it take the name, and the old one goes."""
    place, old = (out.with_name(f".{kind}-{os.getpid()}-{out.name}") for kind in ("part", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield place
        if out.is_dir():
            os.replace(out, old)
            try:
                os.replace(place, out)
            except OSError:
                os.replace(old, out)
                raise
        else:
            os.replace(place, out)
    except (OSError, SafetensorError) as error:
        state = "; the export that was there is whole" if out.exists() else ""
        raise ExportError(f"could not write {out}: {error}{state}") from error
    finally:
        for leftover in (place, old):
            _remove(leftover)


def _picture(backbone: Backbone, prompt: str, steps: int) -> Tensor:
    return generate(backbone, [prompt], [0], steps=steps, guidance_scale=4.0)


def _write_folder(place: Path, source: Source, about: dict, dtype: torch.dtype, part: str, name: str) -> Backbone:
    if part == "text_encoder":
        pipeline_files.write_text_encoder(place, source.backbone.text_encoder, dtype)
        (place / MARK).write_text(model_card.as_json(about), encoding="utf-8")
        return pipeline_files.read_text_encoder(place, source.backbone)
    original = source.original if about["tuned_fraction"] < 1 else None
    checker = pipeline_files.write_folder(place, source.backbone, dtype, source.base, original)
    note = "The base model's safety checker is included." if checker else "No safety checker is included: none came with the base."
    card = model_card.card(about, name, name, _copy_results(source.folder, place), note)
    (place / "README.md").write_text(card, encoding="utf-8")
    (place / MARK).write_text(model_card.as_json(about), encoding="utf-8")
    return pipeline_files.read_folder(place, source.backbone)


def _write_file(place: Path, source: Source, about: dict, dtype: torch.dtype, part: str, name: str) -> Backbone:
    pipeline_files.write_file(place, source.backbone, dtype, part, _metadata(about))
    read = pipeline_files.read_text_encoder if part == "text_encoder" else pipeline_files.read_file
    return read(place, source.backbone)


def _metadata(about: dict) -> dict[str, str]:
    return {"format": "pt", "tc_lightning": json.dumps(about, default=str)}


def _copy_results(run: Path | None, place: Path) -> str | None:
    """The run's scores and sample grid; the grid's name."""
    if run is None:
        return None
    if (run / "scores.csv").is_file():
        shutil.copy(run / "scores.csv", place / "scores.csv")
    for name in ("before_after.png",):
        if (run / "samples" / name).is_file():
            shutil.copy(run / "samples" / name, place / name)
            return name
    return None


def _write_lora(place: Path, source: Source, about: dict, dtype: torch.dtype, rank: int | None) -> None:
    adapters, alphas = (source.adapters, source.alphas) if source.adapters else _extracted(source, rank)
    adapters = {part: {key: value.to(dtype).contiguous() for key, value in state.items()} for part, state in adapters.items()}
    place.mkdir()
    dim, alpha = min(next(iter(next(iter(adapters.values())).values())).shape), next(iter(alphas.values()))
    kohya = {"ss_network_module": "networks.lora", "ss_network_dim": str(dim), "ss_network_alpha": str(float(alpha))}
    save_file(lora_files.to_diffusers(adapters), place / DIFFUSERS_LORA, metadata={"format": "pt"})
    save_file(lora_files.to_kohya(adapters, alphas), place / KOHYA_LORA, metadata=_metadata(about) | kohya)
    for part, config in source.configs.items():
        _write_peft(place / part, adapters[part], {**config, "base_model_name_or_path": _shown(source.base)})
    (place / MARK).write_text(model_card.as_json(about), encoding="utf-8")


def _extracted(source: Source, rank: int | None) -> tuple[lora_files.Adapters, dict[str, float]]:
    if rank is None:
        raise ExportError("this run tuned whole weights, not adapters: lora_rank=16 approximates its change with adapters")
    if source.folder is not None and (source.folder / "unet").is_dir():
        raise ExportError("this run tuned its whole UNet too, which adapters of the text encoder would leave out: to=diffusers")
    before, after = (plain_text_state(model.state_dict()) for model in (source.original, source.backbone.text_encoder))
    return {"text_encoder": lora_files.extract(before, after, rank, TEXT_TARGETS)}, {"text_encoder": float(rank)}


def _write_peft(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    folder.mkdir()
    save_file({f"base_model.model.{key}": value for key, value in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _compare_lora(source: Source, place: Path, reference: Tensor, prompt: str, steps: int) -> Tensor:
    """The picture with adapters; both layouts must give the same, and of a run's own adapters what the merged weights give."""
    base = Backbone.load(**{key: value for key, value in source.backbone.source.items() if key != "run"})
    picture, other = (
        _picture(pipeline_files.read_lora(place / name, base), prompt, steps) for name in (DIFFUSERS_LORA, KOHYA_LORA)
    )
    apart = float((other - picture).abs().max())
    merged = float((picture - reference).abs().max()) if source.adapters else 0.0
    if apart > 1e-3 or merged > 1e-2:
        raise ExportError(f"LoRA read back: the two layouts differ by {apart:.4g}, merged and unmerged by {merged:.4g}; not kept")
    return picture


def upload(folder: str | Path, repo: str, ask: Callable[[str], bool], private: bool = True) -> bool:
    """Send an exported folder to the hub after `ask` said yes; whether it was sent.

    Raises:
        ExportError: no network or no permission; the folder stays, and the message says how to send it later.
    """
    if not ask(f"Upload {folder} to https://huggingface.co/{repo} ({'private' if private else 'public'})?"):
        return False
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder))
    except (OSError, ValueError) as error:
        later = f"the folder is written; later: hf upload {repo} {folder}"
        raise ExportError(f"could not upload to {repo}: {str(error).splitlines()[0]}\n{later}") from error
    return True
