"""Prompts and their noise seeds as training data: batch k of an epoch is a pure function of (seed, epoch, k)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tc_lightning.noise import derive_seed
from tc_lightning.pairs import Pairs, drawn_pairs, folder_pairs, hub_pairs, webdataset_pairs
from tc_lightning.prompt_files import StreamedPrompts, is_large, read_prompts
from tc_lightning.tiny.shapes import captions


def split_prompts(prompts: Sequence[str], dev: int, heldout: int, seed: int = 0) -> dict[str, list[str]]:
    """train, dev and heldout without overlap, drawn from the distinct prompts by a fixed shuffle.

    Raises:
        ValueError: too few distinct prompts to leave one for training.
    """
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) <= dev + heldout:
        raise ValueError(too_few(len(distinct), dev, heldout))
    generator = torch.Generator().manual_seed(derive_seed(seed, 11))
    shuffled = [distinct[i] for i in torch.randperm(len(distinct), generator=generator).tolist()]
    parts = {"dev": shuffled[:dev], "heldout": shuffled[dev : dev + heldout], "train": shuffled[dev + heldout :]}
    return {name: parts[name] for name in ("train", "dev", "heldout")}


def split_stream(prompts: StreamedPrompts, dev: int, heldout: int, seed: int = 0) -> dict[str, Sequence[str]]:
    """The same three of a file that is read by row: dev and heldout are read now, train is what holds none of their prompts.

    A prompt that stands in several rows stays in all of them.

    Raises:
        ValueError: too few distinct prompts to leave one for training.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 11))
    drawn: dict[str, None] = {}
    # as numpy: to walk along a tensor makes one of each number
    for row in torch.randperm(len(prompts), generator=generator).numpy():
        if len(drawn) == dev + heldout:
            break
        drawn.setdefault(prompts[int(row)])
    aside = list(drawn)
    if len(aside) < dev + heldout or prompts.leave_out(aside) == 0:
        raise ValueError(too_few(len(aside), dev, heldout))
    return {"train": prompts, "dev": aside[:dev], "heldout": aside[dev:]}


def too_few(distinct: int, dev: int, heldout: int) -> str:
    """The message where the splits do not come out."""
    return (
        f"{distinct} distinct prompts do not give {dev} for dev (val.prompts), {heldout} held out "
        "(prompts.heldout) and one to train on: give more prompts, or lower these"
    )


class PromptData(LightningDataModule):
    """Training prompts with fixed noise seeds, dev prompts for validation, held-out prompts for the verdict.

    Args:
        train, dev, heldout: prompts; no prompt may be in two of them.
        batch_size: prompts a step and process.
        seeds_per_prompt: how many noise seeds a prompt has; epoch e uses number e modulo this.
        seed: of the order and of the noise seeds.
        workers: loader processes; they change nothing in the data.
        images: (row of train, pixels) -> its image [3, pixels, pixels]; loaded once `require_images` asked for them.
    """

    def __init__(
        self,
        train: Sequence[str],
        dev: Sequence[str] = (),
        heldout: Sequence[str] = (),
        batch_size: int = 8,
        seeds_per_prompt: int = 1_000_000,
        seed: int = 0,
        workers: int = 0,
        images: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or seeds_per_prompt < 1:
            raise ValueError(f"batch_size={batch_size}, seeds_per_prompt={seeds_per_prompt}: accepted: 1 or more")
        if not train:
            raise ValueError("no prompt to train on")
        streamed = isinstance(train, StreamedPrompts)  # holds no prompt of the others by itself
        self.splits = {"train": train if streamed else list(train), "dev": list(dev), "heldout": list(heldout)}
        self._refuse_overlap(list(self.splits)[streamed:])
        self.batch_size, self.seeds_per_prompt, self.seed, self.workers = batch_size, seeds_per_prompt, seed, workers
        self.images, self.pixels = images, 0

    @classmethod
    def shapes(
        cls, train: int = 4096, dev: int = 128, heldout: int = 256, forget: float = 0.0, seed: int = 0, **options
    ) -> PromptData:
        """Captions of the shapes world; the splits share no combination of drawings. Dev and held-out do not depend on `seed`."""
        parts = {"train": captions(train, derive_seed(seed, 12), "train", forget)}
        parts |= {"dev": captions(dev, 0, "dev") if dev else [], "heldout": captions(heldout, 0, "heldout") if heldout else []}
        images = drawn_pairs(parts["train"], seed).load
        return cls(**parts, seed=seed, images=images, **options)

    @classmethod
    def pairs(cls, pairs: Pairs, dev: int = 64, heldout: int = 256, **options) -> PromptData:
        """Images with captions (pairs.py); dev and held-out captions are kept out of training, with all their images."""
        parts = split_prompts(pairs.captions, dev, heldout)
        kept = set(parts["train"])
        rows = [row for row, caption in enumerate(pairs.captions) if caption in kept]
        parts["train"] = [pairs.captions[row] for row in rows]
        return cls(**parts, images=_Chosen(pairs.load, rows), **options)

    @classmethod
    def image_folder(cls, path: str | Path, limit: int | None = None, **options) -> PromptData:
        """A folder of images, each with a caption file beside it (a.png, a.txt)."""
        return cls.pairs(folder_pairs(path, limit), **options)

    @classmethod
    def webdataset(cls, path: str | Path | Sequence[str], limit: int | None = None, **options) -> PromptData:
        """WebDataset tars: one, a folder of them, or a list."""
        return cls.pairs(webdataset_pairs(path, limit), **options)

    @classmethod
    def hub_images(
        cls, name: str, split: str = "train", image: str = "image", caption: str = "text", limit: int | None = None, **options
    ) -> PromptData:
        """A data set of the hub with images and captions; needs the extra `data`."""
        return cls.pairs(hub_pairs(name, split, image, caption, limit), **options)

    def require_images(self, pixels: int) -> None:
        """Batches hold "images" [B, 3, pixels, pixels] from now on.

        Raises:
            ValueError: these prompts have no images.
        """
        if self.images is None:
            raise ValueError(
                "method=direct learns from images with captions, and these prompts have none: prompts=image_folder, "
                "prompts=webdataset or prompts=hub_images; for the embedded model prompts=shapes"
            )
        self.pixels = pixels

    @classmethod
    def file(
        cls,
        path: str | Path,
        column: str = "prompt",
        limit: int | None = None,
        dev: int = 64,
        heldout: int = 256,
        **options,
    ) -> PromptData:
        """Prompts of a file, split by a fixed shuffle that does not depend on the run's seed; a large one is read by row."""
        if is_large(path):
            return cls(**split_stream(StreamedPrompts(path, column, limit), dev, heldout), **options)
        return cls(**split_prompts(read_prompts(path, column, limit), dev, heldout), **options)

    def _refuse_overlap(self, names: list[str]) -> None:
        for index, name in enumerate(names):
            for other in names[index + 1 :]:
                shared = set(self.splits[name]) & set(self.splits[other])
                if shared:
                    raise ValueError(f"{len(shared)} prompts are in both {name} and {other}, for example {min(shared)!r}")

    def warn_about_length(self, count_tokens: Callable[[Sequence[str]], list[int]], limit: int) -> int:
        """Say once how many training prompts exceed the tokenizer's limit (they are cut); returns that number."""
        some = self.splits["train"][:10_000]
        long = sum(count > limit for count in count_tokens(some))
        if long:
            warnings.warn(f"{long} of {len(some)} prompts have more than {limit} tokens: the tokenizer cuts them", stacklevel=2)
        return long

    def train_dataloader(self) -> DataLoader:
        """Batches {"prompts": [B], "seeds": [B]}; a resumed run goes on with the batch after its last."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochBatches(self, rank, world, self._done, self._total())
        rows = _Rows(self.splits["train"], self.seed, self.seeds_per_prompt, self.images if self.pixels else None, self.pixels)
        return DataLoader(rows, batch_sampler=sampler, num_workers=self.workers, collate_fn=_collate)

    def batches(self, rank: int, world: int, total: int) -> Iterator[dict[str, list]]:
        """The first `total` training batches of a rank, as train_dataloader gives them."""
        rows = _Rows(self.splits["train"], self.seed, self.seeds_per_prompt)
        for keys in EpochBatches(self, rank, world, total=total):
            yield _collate([rows[key] for key in keys])

    def val_dataloader(self) -> DataLoader:
        """Dev prompts, each with one fixed seed; ranks share them out.

        Raises:
            ValueError: more processes than dev prompts: one would wait for ever for the scores of the other.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if 0 < len(self.splits["dev"]) < world:
            raise ValueError(f"{len(self.splits['dev'])} dev prompts for {world} processes: val.prompts at least {world}, or 0")
        rows = [(prompt, fixed_seed(index)) for index, prompt in enumerate(self.splits["dev"])]
        return DataLoader(rows[rank::world], batch_size=max(self.batch_size, 32), collate_fn=_collate)

    def _total(self) -> int | None:
        # All epochs are one to Lightning: its own would cut an accumulated step short at their end, and begin anew where a
        # run that had finished is taken further.
        steps = self.trainer.max_steps if self.trainer else 0
        return steps * self.trainer.accumulate_grad_batches if steps > 0 else None

    def _done(self) -> int:
        # Lightning replays the data from the start when it resumes within an epoch: the sampler skips by itself.
        # Checkpoints are written after whole batches only, so the number begun is the number done.
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0


def fixed_seed(index: int) -> int:
    """Noise seed of row `index` of a fixed list of prompts, the same in every run."""
    return derive_seed(0, 14, index)


class EpochBatches:
    """Batches of one rank as lists of (row, epoch), in an order given by (seed, epoch); the last, short batch is dropped.

    Args:
        data: the prompts.
        rank, world: this process and how many there are; they share out one global batch.
        done: how many batches this process has had, in all epochs.
        total: how many it is to have, in all epochs; one epoch's from there on by default.
    """

    def __init__(
        self,
        data: PromptData,
        rank: int = 0,
        world: int = 1,
        done: Callable[[], int] = lambda: 0,
        total: int | None = None,
    ) -> None:
        self.data, self.rank, self.world, self.done, self.total = data, rank, world, done, total
        self.rows = len(data.splits["train"])
        if self.rows < data.batch_size * world:
            raise ValueError(
                f"{self.rows} training prompts do not fill one batch of prompts.batch_size={data.batch_size} x {world} processes"
            )
        self.per_epoch = self.rows // (data.batch_size * world)

    def __len__(self) -> int:
        return self.total or self.per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        done = self.done()
        for number in range(done, self.total or done + self.per_epoch):
            epoch, batch = divmod(number, self.per_epoch)
            if number == done or batch == 0:
                order = self._order(epoch)
            begin = (batch * self.world + self.rank) * self.data.batch_size
            yield [(row, epoch) for row in order[begin : begin + self.data.batch_size].tolist()]

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.data.seed, 15, epoch))
        return torch.randperm(self.rows, generator=generator)


@dataclass(frozen=True)
class _Rows(Dataset):
    """(row, epoch) -> prompt and noise seed; plain data, for it is sent to the workers."""

    prompts: Sequence[str]
    seed: int
    seeds_per_prompt: int
    images: Callable[[int, int], Tensor] | None = None
    pixels: int = 0

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        index, epoch = key
        row = self.prompts[index], derive_seed(self.seed, 13, index, epoch % self.seeds_per_prompt)
        return row if self.images is None else (*row, self.images(index, self.pixels))

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class _Chosen:
    """Some rows of a source of images."""

    load: Callable[[int, int], Tensor]
    rows: list[int]

    def __call__(self, index: int, pixels: int) -> Tensor:
        return self.load(self.rows[index], pixels)


def _collate(rows: list[tuple]) -> dict[str, Any]:
    batch: dict[str, Any] = {"prompts": [row[0] for row in rows], "seeds": [row[1] for row in rows]}
    return batch if len(rows[0]) == 2 else batch | {"images": torch.stack([row[2] for row in rows])}
