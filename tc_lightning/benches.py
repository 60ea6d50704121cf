"""Benches: named lists of prompts with categories, on which models are compared."""

from __future__ import annotations

import csv
import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_lightning.prompts import read_prompts
from tc_lightning.tiny.captions import read
from tc_lightning.tiny.shapes import captions

PARTI = ("https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv", "nateraw/parti-prompts")
GENEVAL = ("https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl", "")
HPSV2 = "zhwang/HPDv2"
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
OFFLINE = ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class Bench:
    """Named prompts, each with its category ("" where the bench has none).

    Args:
        name: short, for tables.
        prompts: P texts; a text that comes twice is scored twice, each time on other noise.
        categories: P names, or nothing.
        group: prompts in a group, where the bench states a category as mean and spread of such groups; else 0.

    Raises:
        ValueError: no prompt, or another number of categories than prompts.
    """

    name: str
    prompts: tuple[str, ...]
    categories: tuple[str, ...] = ()
    group: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"bench {self.name} is empty: no prompt to score")
        if not self.categories:
            object.__setattr__(self, "categories", ("",) * len(self.prompts))
        if len(self.categories) != len(self.prompts):
            raise ValueError(f"bench {self.name}: {len(self.categories)} categories for {len(self.prompts)} prompts")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def occurrences(self) -> list[int]:
        """How often each prompt came before: 0 for the first time."""
        seen: Counter[str] = Counter()
        found = []
        for prompt in self.prompts:
            found.append(seen[prompt])
            seen[prompt] += 1
        return found

    def select(self, category: str | Sequence[str] | None = None, limit: int | None = None) -> Bench:
        """The prompts of some categories, then at most `limit` of them, as many from each category as there are.

        Raises:
            ValueError: a category that the bench does not have, or a limit below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"bench.limit={limit}: accepted: 1 or more, or null for all")
        wanted = [category] if isinstance(category, str) else list(category or [])
        known = list(dict.fromkeys(self.categories))
        for name in wanted:
            if name not in known:
                names = ", ".join(name for name in known if name) or "none"
                raise ValueError(f"bench {self.name} has no category {name!r}: it has {names}")
        rows = [index for index, name in enumerate(self.categories) if not wanted or name in wanted]
        rows = sorted(_evenly(rows, self.categories, limit)) if limit else rows
        return Bench(self.name, tuple(self.prompts[i] for i in rows), tuple(self.categories[i] for i in rows), self.group)

    @classmethod
    def shapes(cls, count: int = 256, category: str | Sequence[str] | None = None, limit: int | None = None) -> Bench:
        """Held-out captions of the shapes world, the ones that training reports on; categories: one thing, two things."""
        prompts = captions(count, 0, "heldout") if count > 0 else []
        kinds = ("one thing", "two things")
        made = cls("shapes", tuple(prompts), tuple(kinds[len(read(prompt).things) - 1] for prompt in prompts))
        return made.select(category, limit)

    @classmethod
    def parti(
        cls,
        path: str | Path | None = None,
        category: str | Sequence[str] | None = None,
        limit: int | None = None,
        by: str = "Category",
    ) -> Bench:
        """Parti-Prompts (Yu et al. 2022): 1632 prompts; `by` takes Category (12 of them) or Challenge (11)."""
        return cls._table("parti", _find(path, "parti", *PARTI), "Prompt", by).select(category, limit)

    @classmethod
    def geneval(
        cls, path: str | Path | None = None, category: str | Sequence[str] | None = None, limit: int | None = None
    ) -> Bench:
        """The prompts of GenEval (Ghosh et al. 2023): 553 in six tags. Its detector is not part of this bench."""
        return cls._table("geneval", _find(path, "geneval", *GENEVAL), "prompt", "tag").select(category, limit)

    @classmethod
    def hpsv2(cls, path: str | Path | None = None, category: str | Sequence[str] | None = None, limit: int | None = None) -> Bench:
        """HPSv2 benchmark (Wu et al. 2023): 800 prompts in each of four styles; a style is the mean of ten groups of 80.

        Args:
            path: folder with anime.json, concept-art.json, paintings.json, photo.json; by default they are fetched.
        """
        prompts: list[str] = []
        styles: list[str] = []
        for style in HPSV2_STYLES:
            texts = read_prompts(_style_file(path, style))
            prompts += texts
            styles += [style] * len(texts)
        return cls("hpsv2", tuple(prompts), tuple(styles), 80).select(category, limit)

    @classmethod
    def file(
        cls,
        path: str | Path,
        column: str = "prompt",
        category_column: str | None = None,
        category: str | Sequence[str] | None = None,
        limit: int | None = None,
    ) -> Bench:
        """The prompts of a text file (a line each), CSV, TSV, JSON list or JSON lines."""
        return cls._table(Path(path).stem, Path(path), column, category_column).select(category, limit)

    @classmethod
    def _table(cls, name: str, path: Path, column: str, category_column: str | None) -> Bench:
        prompts = read_prompts(path, column)
        categories: list[str] = []
        if category_column is not None:
            categories = _column(path, column, category_column)
        repeated = sum(count - 1 for count in Counter(prompts).values())
        if repeated:
            warnings.warn(f"{path}: {repeated} prompts are repetitions; each is scored, on other noise", stacklevel=3)
        return cls(name, tuple(prompts), tuple(categories))


def _column(path: Path, column: str, category_column: str) -> list[str]:
    """The categories of the rows that have a prompt, in the order of read_prompts."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".csv", ".tsv"):
        rows: Iterable[dict[str, Any]] = csv.DictReader(
            text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ","
        )
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(text)
    else:
        raise ValueError(f"{path} has lines and no columns: bench.category_column={category_column} needs .csv, .tsv or .json")
    categories = []
    for row in rows:
        named = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        if category_column.lower() not in named:
            raise ValueError(f"{path} has no column {category_column!r}: it has {', '.join(map(str, row)) or 'none'}")
        if str(named.get(column.lower()) or "").strip():
            categories.append(str(named[category_column.lower()] or "").strip())
    return categories


def _evenly(rows: list[int], categories: Sequence[str], limit: int) -> list[int]:
    """The first rows of each category in turn, until there are `limit`."""
    lines = defaultdict(list)
    for row in rows:
        lines[categories[row]].append(row)
    turns = sorted((place, row) for line in lines.values() for place, row in enumerate(line))
    return [row for _, row in turns[:limit]]


def _style_file(path: str | Path | None, style: str) -> Path:
    if path is not None and Path(path).is_dir():
        for folder in (Path(path), Path(path) / "benchmark"):
            if (folder / f"{style}.json").is_file():
                return folder / f"{style}.json"
        raise FileNotFoundError(f"{path} has no {style}.json: bench.path= takes a folder with {', '.join(HPSV2_STYLES)} (.json)")
    if path is not None and not _is_hub_id(path):
        raise FileNotFoundError(f"no folder {path}: bench.path= takes a folder with {', '.join(HPSV2_STYLES)} (.json), or a hub id")
    return _from_hub(str(path or HPSV2), f"benchmark/{style}.json", "hpsv2", "a folder with the four files")


def _find(path: str | Path | None, name: str, url: str, hub_id: str) -> Path:
    """A local file, a file of a hub dataset, or the published one, kept in the cache."""
    if path is not None and (Path(path).exists() or not _is_hub_id(path)):
        return Path(path)
    if path is not None:
        return _from_hub(str(path), url.rsplit("/", 1)[-1], name, "the file")
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tc_lightning" / url.rsplit("/", 1)[-1]
    other = f" or a hub dataset such as {hub_id}" if hub_id else ""
    return place if place.is_file() else _fetch(lambda: _download(url, place), url, name, f"the file{other}")


def _is_hub_id(path: str | Path) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and Path(path).suffix == ""


def _from_hub(hub_id: str, file: str, name: str, what: str) -> Path:
    from huggingface_hub import hf_hub_download

    source = f"{file} of https://huggingface.co/datasets/{hub_id}"
    return _fetch(lambda: Path(hf_hub_download(hub_id, file, repo_type="dataset")), source, name, what)


def _fetch(load: Callable[[], Path], source: str, name: str, what: str) -> Path:
    try:
        return load()
    except (OSError, ValueError) as error:  # what urllib and huggingface_hub raise without network, file or permission
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"bench {name}: could not fetch {source} ({first}). Fetch it yourself and name {what}: bench.path=<path>"
        ) from error


def _download(url: str, place: Path) -> Path:
    from torch.hub import download_url_to_file

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    place.parent.mkdir(parents=True, exist_ok=True)
    download_url_to_file(url, str(place), progress=False)
    return place
