"""Prompt files: read whole, or by row where they are large."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

LARGE = 64 * 2**20  # bytes: a text, CSV or TSV file from here on is read row by row
CHUNK = 2**24  # bytes looked at together
NEWLINE, QUOTE = 10, 34


def read_prompts(path: str | Path, column: str = "prompt", limit: int | None = None) -> list[str]:
    """Prompts of a text file (a line each), CSV or TSV (the named column), JSON list or JSON lines; blank ones are dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, no prompt in it, no such column, or an unknown kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file {path}: a text file with a prompt a line, or .csv, .tsv, .json, .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from error
    try:
        prompts = [prompt.strip() for prompt in _rows(path, text, column) if prompt and prompt.strip()]
    except csv.Error as error:
        raise ValueError(f"{path} is not {path.suffix[1:]}: {error}") from error
    odd = next((prompt for prompt in prompts if any("\ud800" <= letter <= "\udfff" for letter in prompt)), None)
    if odd is not None:  # half a character, which JSON can spell and no tokenizer can read
        raise ValueError(f"{path} has a prompt with half a character: {odd[:60]!a}")
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts[:limit]


def is_large(path: str | Path) -> bool:
    """Whether a file is to be read by row: StreamedPrompts reads its kind, and it has LARGE bytes or more."""
    path = Path(path)
    return path.suffix in (".txt", "", ".csv", ".tsv") and path.is_file() and path.stat().st_size >= LARGE


def _rows(path: Path, text: str, column: str) -> Iterator[str]:
    # lines end in \n only (reading has made \r\n so): str.splitlines would also cut a prompt at U+2028 or a form feed
    if path.suffix in (".txt", ""):
        return iter(text.split("\n"))
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        names = table.fieldnames or []
        found = next((name for name in names if name.lower() == column.lower()), None)
        if found is None:
            raise ValueError(f"{path} has no column {column!r}: it has {', '.join(names) or 'none'}")
        return (row[found] for row in table)
    if path.suffix in (".json", ".jsonl"):
        return (_prompt(row, path, column) for row in _json(path, text))
    raise ValueError(f"{path}: unknown kind of prompt file {path.suffix!r}, accepted: .txt, .csv, .tsv, .json, .jsonl")


def _json(path: Path, text: str) -> list:
    try:
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not {path.suffix[1:]}: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, accepted: a list of prompts or of rows")
    return rows


def _prompt(row: object, path: Path, column: str) -> str:
    found = row.get(column) if isinstance(row, dict) else row
    if not isinstance(found, str):
        raise ValueError(f"{path} has a row without a text under {column!r}: {json.dumps(row)[:100]}")
    return found


class StreamedPrompts(Sequence[str]):
    """Prompts of a large text, CSV or TSV file, read when they are asked for; 8 bytes a row stay in memory.

    One pass over the bytes finds where rows begin: a line end outside quotes. A row without a prompt, or with one that was left
    out, stands for the next row that has another, so every number below the number of rows is a prompt, and always the same one.

    Args:
        path, column: as of read_prompts.
        limit: rows.

    Raises:
        FileNotFoundError, ValueError: as read_prompts, as far as the head of the file tells; a quote that is never closed; while
            rows are read, one that is not UTF-8.
    """

    def __init__(self, path: str | Path, column: str = "prompt", limit: int | None = None) -> None:
        self.path, self.without, self._file = Path(path), frozenset(), None
        self.delimiter = {".csv": ",", ".tsv": "\t"}.get(self.path.suffix)
        self.starts = row_starts(self.path, quoted=self.delimiter is not None)
        if self.delimiter is not None:
            self.place, self.starts = self._column(column), self.starts[1:]
        if limit is not None:
            self.starts = self.starts[: limit + 1]
        if len(self) == 0 or self._prompt(0) is None:
            raise ValueError(f"{self.path} holds no prompt")

    def _column(self, column: str) -> int:
        header = self._read(0).removeprefix("\ufeff")
        names = next(csv.reader(io.StringIO(header, newline=""), delimiter=self.delimiter), [])
        found = next((place for place, name in enumerate(names) if name.lower() == column.lower()), None)
        if found is None:
            raise ValueError(f"{self.path} has no column {column!r}: it has {', '.join(names) or 'none'}")
        return found

    def __len__(self) -> int:
        return max(0, len(self.starts) - 1)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._prompt(index % len(self))

    def digest(self) -> str:
        """Of where rows begin, what is left out and CHUNK bytes at each end: 16 hexadecimal digits without reading all."""
        whole = blake2b(self.starts.tobytes(), digest_size=8)
        whole.update("\0".join(sorted(self.without)).encode())
        with self.path.open("rb") as file:
            whole.update(file.read(CHUNK))
            file.seek(max(0, int(self.starts[-1]) - CHUNK))
            whole.update(file.read(CHUNK))
        return whole.hexdigest()

    def leave_out(self, prompts: Iterable[str]) -> int:
        """Hold these back from now on; returns how many rows there are, 0 where no other prompt is left."""
        self.without = frozenset(prompts)
        return len(self) if self._prompt(0) is not None else 0

    def _prompt(self, row: int) -> str | None:
        for ahead in range(len(self)):
            prompt = self.row((row + ahead) % len(self))
            if prompt and prompt not in self.without:
                return prompt
        return None

    def row(self, number: int) -> str:
        """What a row says, stripped; empty where it has no prompt."""
        text = self._read(number)
        if self.delimiter is None:
            return text.removeprefix("\ufeff").strip() if number == 0 else text.strip()
        try:
            fields = next(csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline=""), delimiter=self.delimiter), [])
        except csv.Error as error:
            raise ValueError(f"{self.path} is not {self.path.suffix[1:]} at byte {self.starts[number]}: {error}") from error
        return fields[self.place].strip() if self.place < len(fields) else ""

    def _read(self, number: int) -> str:
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        begin, end = int(self.starts[number]), int(self.starts[number + 1])
        # not seek and read: a worker that was forked shares the position
        try:
            return os.pread(self._file.fileno(), end - begin, begin).decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, begin + error.start) from error

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


def row_starts(path: Path, quoted: bool) -> np.ndarray:
    """Byte offsets [rows + 1] at which rows begin, the file's length last; blank lines at the end are none.

    Raises:
        ValueError: a quote that is never closed.
    """
    found, inside, offset = [np.zeros(1, np.int64)], 0, 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            data = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(data == NEWLINE)
            if quoted:
                # a line end is a row's where the number of quotes before it is even; doubled quotes keep the count even
                quotes = np.flatnonzero(data == QUOTE)
                ends = ends[(np.searchsorted(quotes, ends) + inside) % 2 == 0]
                inside = (inside + len(quotes)) % 2
            found.append(ends + (offset + 1))
            offset += len(block)
    if inside:
        raise ValueError(f'{path} has a quote that is never closed: a row that begins with " must end with one')
    starts = np.concatenate(found)
    return starts if starts[-1] == offset else np.append(starts, offset)


def not_utf8(path: Path, byte: int) -> ValueError:
    """The error for a file in another encoding."""
    return ValueError(f"{path} is not UTF-8 (byte {byte}): convert it, for example with iconv -t utf-8")
