"""Commands run inside the test process, small settings, and small random pipelines in the layouts of real models."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# what a test relies on is said here: the defaults follow what was found best
SMALL = (
    "reward=[tiny_preference]",
    "constraint=tiny_clip",
    "watch=oracle",
    "schedule=last_k",
    "lr_scheduler=constant",
    "optimizer.lr=1e-4",
    "max_steps=2",
    "chain.steps=3",
    "chain.guidance_scale=4.0",
    "schedule.k=1",
    "prompts.train=8",
    "prompts.batch_size=2",
    "prompts.heldout=4",
    "val.prompts=2",
    "val.every=2",
    "callbacks.sample_grid.prompts=1",
    "callbacks.sample_grid.seeds=1",
    "trainer.log_every_n_steps=1",
)


@dataclass
class Done:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def door(*arguments: str) -> Done:
    """`python -m tc_lightning <arguments>`, in this process."""
    from tc_lightning.cli import main

    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = ["tc_lightning", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        err.write("" if isinstance(stop.code, int) else str(stop.code))
    finally:
        sys.argv = argv
    return Done(status, out.getvalue(), err.getvalue())


def train(folder: Path, *overrides: str) -> dict:
    """A small training run in `folder` that must succeed; its run.json."""
    done = door("train", *SMALL, f"hydra.run.dir={folder}", *overrides)
    assert done.status == 0, done.err
    return json.loads((folder / "run.json").read_text())


def kept(shared: Path, *overrides: str) -> Path:
    """A run folder under `shared` (of the session), trained when first asked for."""
    if not (shared / "run.json").exists():
        assert train(shared, *overrides)["status"] == "finished"
    return shared


def refused(done: Done, *words: str) -> None:
    """A command must have ended with one clear message that holds these words."""
    assert done.status != 0
    assert "Traceback" not in done.err and done.err.count("error: ") == 1, done.err
    for word in words:
        assert word in done.err, done.err


def small_pipeline(folder: Path, width: int = 32, prediction_type: str = "epsilon", seed: int = 0, penultimate: bool = False):
    """A random StableDiffusionPipeline with the published parts and small numbers, saved as a diffusers folder.

    The scheduler is PNDM, as in Stable Diffusion 1.5's repository; `penultimate` takes 2.x' activation and its text encoder
    without the last layer.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from tc_lightning.tiny.model import make_tokenizer

    tokenizer = make_tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1 if penultimate else 2,
            num_attention_heads=4,
            hidden_act="gelu" if penultimate else "quick_gelu",
            **ends,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=width,
            attention_head_dim=2,
            norm_num_groups=8,
            use_linear_projection=penultimate,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16),
            norm_num_groups=8,
            sample_size=16,
        )
        scheduler = PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_language_model(folder: Path) -> Path:
    """A random GPT-2 with a byte-level tokenizer of its own, saved as the hub has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*alphabet, "<|endoftext|>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = {"eos_token_id": 256, "bos_token_id": 256}
        GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=2, n_head=2, **ids)).save_pretrained(folder)
    return folder
