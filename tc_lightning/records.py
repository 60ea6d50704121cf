"""Fixed-size records under a key, in memory-mapped files that several processes read and write at once.

A folder holds segments. A segment is two files: `<name>.records`, the payloads one after the other, and `<name>.index`, an
entry (key, digest) for each, written after its payload. A segment has one writer, the process that made it, so there is no
lock; every process reads all of them. A process that dies leaves at most a payload without an entry, which nobody reads. The
digest covers key and payload: what a crash of the whole machine left half-written does not pass it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from hashlib import blake2b
from io import FileIO
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: two processes may then compute the same record, which does no harm
    fcntl = None

KEY, DIGEST = 16, 8  # bytes
ENTRY = np.dtype([("first", "<u8"), ("rest", "<u8"), ("digest", "<u8")])
SEGMENT = 256 * 2**20  # bytes
PENDING = 2**16  # entries kept in a dict before they are sorted in


class Index:
    """key -> place, 16 bytes an entry; keys that agree in their first 8 bytes are told apart by the record's digest."""

    def __init__(self) -> None:
        self._keys, self._places = np.empty(0, np.uint64), np.empty(0, np.uint64)
        self._pending: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._keys) + len(self._pending)

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Enter first halves of keys with their places."""
        self._pending.update(zip(keys.tolist(), places.tolist(), strict=True))
        if len(self._pending) > PENDING:
            keys = np.concatenate([self._keys, np.fromiter(self._pending.keys(), np.uint64)])
            places = np.concatenate([self._places, np.fromiter(self._pending.values(), np.uint64)])
            order = np.argsort(keys, kind="stable")
            self._keys, self._places, self._pending = keys[order], places[order], {}

    def find(self, key: int) -> int | None:
        """Where the record of a key's first half is."""
        if key in self._pending:
            return self._pending[key]
        at = int(np.searchsorted(self._keys, np.uint64(key), side="right")) - 1
        return int(self._places[at]) if at >= 0 and int(self._keys[at]) == key else None


class RecordStore:
    """Records of one size under keys of 16 bytes.

    Args:
        folder: made where it is absent; the folders beside it that hold segments share its `max_bytes`.
        record_bytes: of a payload.
        max_bytes: of all segments in `folder` and beside it. Segments that nobody has used since this store was opened give
            way, those unused longest first. What is in use is never deleted, for a run meets its records in turn and would delete
            each just before it is due: a full store takes no more instead, and says so once. Exceeded by a segment a process at
            most.
    """

    def __init__(self, folder: str | Path, record_bytes: int, max_bytes: int | None = None) -> None:
        self.folder, self.record_bytes, self.max_bytes = Path(folder), record_bytes, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        budget = SEGMENT if max_bytes is None else min(SEGMENT, max_bytes // 16)
        self.slots = max(1, budget // record_bytes)
        self.full = False
        self._index = Index()
        self._names: list[str] = []
        self._known: dict[str, int] = {}  # entries read of each segment
        self._maps: dict[int, np.memmap] = {}
        self._used: dict[int, float] = {}  # when a segment's use was last written down
        self._gone: set[int] = set()  # segments that have given way
        self._opened, self._looked = time.time(), 0.0
        self._mine: int | None = None  # the segment that this process writes
        self._count, self._writers = 0, []
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        place = self._index.find(_halves(key)[0])
        return place is not None and place >> 32 not in self._gone

    def refresh(self, at_most_every: float = 0.0) -> None:
        """Read what other processes have written since; not again within so many seconds."""
        if time.monotonic() - self._looked < at_most_every:
            return
        files = sorted(self.folder.glob("*.index"))
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                self._read_entries(file)
        present = {file.stem for file in files}
        self._gone = {number for number, name in enumerate(self._names) if name not in present}
        self._looked = time.monotonic()

    def _read_entries(self, file: Path) -> None:
        known, size = self._known.get(file.stem, 0), file.stat().st_size // ENTRY.itemsize
        if file.stem not in self._known:
            self._names.append(file.stem)
        self._known[file.stem] = size
        if size > known:
            entries = np.fromfile(file, ENTRY, size - known, offset=known * ENTRY.itemsize)
            segment = self._names.index(file.stem)
            self._index.add(entries["first"], np.uint64(segment << 32) + np.arange(known, size, dtype=np.uint64))

    def get(self, key: bytes) -> np.ndarray | None:
        """The payload [record_bytes] of a key as bytes of our own, None where it is absent or damaged."""
        first, rest = _halves(key)
        place = self._index.find(first)
        if place is None:
            return None
        segment, slot = place >> 32, place & 0xFFFFFFFF
        try:
            payload = self._payload(segment, slot)
            entry = np.fromfile(self._file(segment, "index"), ENTRY, 1, offset=slot * ENTRY.itemsize)
        except (FileNotFoundError, ValueError):  # given way to newer ones, or cut short
            return None
        if payload is None or len(entry) == 0 or int(entry["rest"][0]) != rest or int(entry["digest"][0]) != _digest(key, payload):
            return None
        self._note_use(segment)
        return payload

    def _payload(self, segment: int, slot: int) -> np.ndarray | None:
        mapped = self._maps.get(segment)
        if mapped is None or len(mapped) <= slot:
            rows = self._file(segment, "records").stat().st_size // self.record_bytes
            if rows <= slot:
                return None
            mapped = np.memmap(self._file(segment, "records"), np.uint8, "r", shape=(rows, self.record_bytes))
            self._maps[segment] = mapped
        return np.array(mapped[slot])

    def put(self, key: bytes, payload: np.ndarray | bytes) -> bool:
        """Keep a payload; False where there is no room for it. A disk that is full ends the keeping, not the run."""
        payload = memoryview(payload).cast("B")
        if len(payload) != self.record_bytes:
            raise ValueError(f"a payload of {len(payload)} bytes, accepted: {self.record_bytes}")
        if self.full or not self._room():
            return False
        first, rest = _halves(key)
        entry = np.array([(first, rest, _digest(key, payload))], ENTRY)
        try:
            # the payload first: an entry vouches for what lies on the disk already
            _write(self._writers[0], payload, self._count * self.record_bytes)
            _write(self._writers[1], memoryview(entry.tobytes()), self._count * ENTRY.itemsize)
        except OSError as error:
            self._stop(f"could not be written ({error.strerror})")
            return False
        self._index.add(entry["first"], np.array([(self._mine << 32) + self._count], np.uint64))
        self._count += 1
        self._known[self._names[self._mine]] = self._count
        return True

    def _room(self) -> bool:
        if self._mine is None or self._count == self.slots:
            if not self._make_room():
                self._stop(f"is full ({self.max_bytes / 1e9:g} GB, cache.max_gb)")
                return False
            self._close()
            self._begin_segment()
        return True

    def _begin_segment(self) -> None:
        name = f"{int(self._opened)}-{uuid.uuid4().hex[:12]}"
        self._names.append(name)
        self._mine, self._count, self._known[name] = len(self._names) - 1, 0, 0
        self._writers = [open(self._file(self._mine, kind), "xb", buffering=0) for kind in ("records", "index")]  # noqa: SIM115

    def _make_room(self) -> bool:
        """Whether another segment fits, after deleting what is long unused."""
        if self.max_bytes is None:
            return True
        segments = []
        for file in self.folder.parent.glob("*/*.index"):
            with contextlib.suppress(FileNotFoundError):
                records = file.with_suffix(".records")
                segments.append((file.stat().st_mtime, file.stat().st_size + records.stat().st_size, file))
        total = sum(size for _, size, _ in segments) + self.slots * (self.record_bytes + ENTRY.itemsize)
        for used, size, file in sorted(segments):
            if total <= self.max_bytes:
                break
            if used < self._opened - 1:  # a file's time may lag a little behind the clock
                file.unlink(missing_ok=True)  # the index first: no entry without its payload
                file.with_suffix(".records").unlink(missing_ok=True)
                total -= size
        return total <= self.max_bytes

    def _note_use(self, segment: int) -> None:
        """The index's time says when its segment was last used, to the minute."""
        now = time.monotonic()
        if now - self._used.get(segment, -1e9) > 60:
            self._used[segment] = now
            with contextlib.suppress(OSError):  # a store of somebody else's, read only
                os.utime(self._file(segment, "index"))

    def _stop(self, why: str) -> None:
        self.full = True
        warnings.warn(f"the store {self.folder} {why}: {len(self):,} records are kept, the others are computed", stacklevel=2)

    def _close(self) -> None:
        for writer in self._writers:
            writer.close()

    def _file(self, segment: int, kind: str) -> Path:
        return self.folder / f"{self._names[segment]}.{kind}"

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Whether piece `number` of some work is this process's for as long as the block lasts; a dead process holds nothing."""
        if fcntl is None:
            yield True
            return
        with open(self.folder / "claims", "a+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except OSError:
                yield False
                return
            yield True


def _halves(key: bytes) -> tuple[int, int]:
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:KEY], "little")


def _digest(key: bytes, payload: np.ndarray | memoryview) -> int:
    return int.from_bytes(blake2b(payload, digest_size=DIGEST, key=key).digest(), "little")


def _write(file: FileIO, data: memoryview, offset: int) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]
