"""The store of fixed-size records: what is read is what was written, whoever wrote it and however he ended."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tc_lightning import records
from tc_lightning.records import ENTRY, Index, RecordStore


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") + b"\1" * 8


def payload(number: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def filled(folder, numbers, **options) -> RecordStore:
    store = RecordStore(folder, 64, **options)
    assert all(store.put(key(number), payload(number)) for number in numbers)
    return store


def held(store, numbers) -> list[int]:
    """Which numbers are found; what is found must be right."""
    found = []
    for number in numbers:
        got = store.get(key(number))
        if got is not None:
            assert np.array_equal(got, payload(number)), number
            found.append(number)
    return found


def test_what_was_put_is_got_by_this_and_any_later_process(tmp_path):
    store = filled(tmp_path / "a", range(20))
    assert held(store, range(30)) == list(range(20)) and len(store) == 20
    assert key(3) in store and key(25) not in store
    assert held(RecordStore(tmp_path / "a", 64), range(30)) == list(range(20))


def test_a_reader_sees_what_another_writes_after_a_refresh(tmp_path):
    reader, writer = RecordStore(tmp_path / "a", 64), RecordStore(tmp_path / "a", 64)
    writer.put(key(1), payload(1))
    assert reader.get(key(1)) is None
    reader.refresh()
    assert held(reader, [1]) == [1]
    writer.put(key(2), payload(2))
    reader.refresh(at_most_every=100)
    assert reader.get(key(2)) is None
    reader.refresh()
    assert held(reader, [2]) == [2], "the mapped file has grown"


def test_a_payload_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a payload of 63 bytes, accepted: 64"):
        RecordStore(tmp_path / "a", 64).put(key(1), payload(1, 63))


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 127])
def test_a_payload_cut_short_is_not_read(cut, tmp_path):
    filled(tmp_path / "a", range(3))
    (file,) = (tmp_path / "a").glob("*.records")
    os.truncate(file, file.stat().st_size - cut)
    assert held(RecordStore(tmp_path / "a", 64), range(3)) == list(range(3 - -(-cut // 64)))


@pytest.mark.parametrize("cut", [1, 8, 23])
def test_an_entry_cut_short_is_not_read(cut, tmp_path):
    filled(tmp_path / "a", range(3))
    (file,) = (tmp_path / "a").glob("*.index")
    os.truncate(file, file.stat().st_size - cut)
    assert held(RecordStore(tmp_path / "a", 64), range(3)) == [0, 1]


def test_a_damaged_record_is_a_miss_and_can_be_written_again(tmp_path):
    """As after a crash of the machine: sizes are right, bytes are not."""
    filled(tmp_path / "a", range(3))
    (file,) = (tmp_path / "a").glob("*.records")
    with file.open("r+b") as opened:
        opened.seek(64)
        opened.write(b"\0" * 8)
    store = RecordStore(tmp_path / "a", 64)
    assert held(store, range(3)) == [0, 2]
    store.put(key(1), payload(1))
    assert held(store, range(3)) == [0, 1, 2]


def test_keys_that_agree_in_their_first_half_are_not_mixed_up(tmp_path):
    store = RecordStore(tmp_path / "a", 64)
    one, two = b"\7" * 8 + b"\1" * 8, b"\7" * 8 + b"\2" * 8
    store.put(one, payload(1))
    assert store.get(two) is None and np.array_equal(store.get(one), payload(1))


def test_the_index_sorts_in_what_is_pending(monkeypatch):
    monkeypatch.setattr(records, "PENDING", 7)
    index, numbers = Index(), np.random.default_rng(0).permutation(50).astype(np.uint64)
    for some in np.split(numbers, 10):
        index.add(some, some + np.uint64(1000))
    assert len(index) == 50 and [index.find(n) for n in range(50)] == [n + 1000 for n in range(50)]
    assert index.find(50) is None and index.find(2**63) is None
    index.add(np.full(9, 3, np.uint64), np.arange(9, dtype=np.uint64))
    assert index.find(3) == 8, "the last place counts"


WRITER = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from test_records import key, payload
from tc_lightning.records import RecordStore
store = RecordStore(sys.argv[1], 1_000_000)
print("ready", flush=True)
for number in range(int(sys.argv[2]), 10**6, int(sys.argv[3])):
    store.refresh()
    store.put(key(number), payload(number, 1_000_000))
"""


def writer(folder, first, step):
    code = WRITER.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, str(folder), str(first), str(step)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.full
def test_two_processes_killed_amid_writing_leave_nothing_half_written(tmp_path):
    """They are killed at moments of chance; all that is found is whole, and most of what was written is found."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        both = [writer(folder, first, 2) for first in range(2)]
        time.sleep(0.3 + 0.1 * attempt)
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.wait()
        store = RecordStore(folder, 1_000_000)
        written = sum(file.stat().st_size for file in folder.glob("*.records")) // 1_000_000
        right = [n for n in range(2 * written) if store.get(key(n)) is not None]
        assert all(np.array_equal(store.get(key(n)), payload(n, 1_000_000)) for n in right)
        assert len(right) == len(store) >= written - 2 > 0 and {n % 2 for n in right} == {0, 1}


def test_a_claim_is_one_process_s_and_ends_with_it(tmp_path):
    store = RecordStore(tmp_path / "a", 64)
    code = (
        "import sys, time; from tc_lightning.records import RecordStore\n"
        "with RecordStore(sys.argv[1], 64).claim(5) as mine: print(mine, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with store.claim(5) as mine, store.claim(6) as free:
        assert (mine, free) == (False, True)
    other.kill()
    other.wait()
    with store.claim(5) as mine:
        assert mine


def age(folder, seconds):
    for file in folder.glob("*.index"):
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def segment_bytes(records_each):
    return records_each * (64 + ENTRY.itemsize)


def test_what_is_unused_longest_gives_way_first(tmp_path):
    for name, seconds in (("old", 3000), ("older", 9000)):
        filled(tmp_path / name, range(4))
        age(tmp_path / name, seconds)
    store = filled(tmp_path / "new", range(4), max_bytes=int(segment_bytes(4) * 2.5))
    assert not list((tmp_path / "older").glob("*.*")) and len(list((tmp_path / "old").glob("*.*"))) == 2
    assert held(store, range(4)) == list(range(4))


def test_a_store_that_is_full_keeps_what_is_in_use_and_says_so_once(tmp_path):
    """A run meets its records in turn: the one unused longest is the one that is due next."""
    limit = segment_bytes(10)
    store = filled(tmp_path / "a", range(5), max_bytes=limit)
    with pytest.warns(UserWarning, match="is full .*cache.max_gb.* are kept, the others are computed") as caught:
        taken = [store.put(key(number), payload(number)) for number in range(5, 30)]
    assert len(caught) == 1 and taken == sorted(taken, reverse=True) and 1 < sum(taken) < 25
    assert held(store, range(30)) == list(range(5 + sum(taken)))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.*")) <= limit


def test_use_is_noted_so_that_another_run_does_not_delete_it(tmp_path):
    filled(tmp_path / "a", range(4))
    age(tmp_path / "a", 9000)
    late = RecordStore(tmp_path / "b", 64, max_bytes=segment_bytes(4))
    reader = RecordStore(tmp_path / "a", 64)
    assert held(reader, [2]) == [2]
    with pytest.warns(UserWarning, match="is full"):
        assert not late.put(key(1), payload(1))
    assert held(reader, range(4)) == list(range(4))


def test_a_reader_whose_segment_was_deleted_computes_again(tmp_path):
    reader = filled(tmp_path / "a", range(4))
    late = RecordStore(tmp_path / "a", 64)
    for file in (tmp_path / "a").glob("*.*"):
        file.unlink()
    late.refresh()
    assert late.get(key(1)) is None and key(1) not in late
    assert reader.get(key(1)) is None


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch):
    store = filled(tmp_path / "a", range(2))

    def full(file, data, offset):
        file.seek(offset)
        file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "_write", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert not store.put(key(2), payload(2))
    monkeypatch.undo()
    assert not store.put(key(3), payload(3))
    assert held(RecordStore(tmp_path / "a", 64), range(4)) == [0, 1]


def test_threads_of_one_process_may_read_at_once(tmp_path):
    store, results = filled(tmp_path / "a", range(50)), []
    threads = [threading.Thread(target=lambda: results.append(held(store, range(50)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(50))] * 4
