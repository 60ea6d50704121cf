"""Prompt files, splits, and batches that are a pure function of (seed, epoch, number)."""

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from tc_lightning import prompt_files
from tc_lightning.noise import gaussian
from tc_lightning.prompt_files import StreamedPrompts
from tc_lightning.prompts import EpochBatches, PromptData, fixed_seed, read_prompts, split_prompts
from tc_lightning.tiny.captions import read
from tc_lightning.tiny.shapes import split_of

PROMPTS = [f"a red circle number {index}" for index in range(24)]


def rows(data: PromptData, epochs: int = 1, done: int = 0) -> list[tuple[str, int]]:
    """(prompt, seed) of every row of a loader's epochs, batches undone."""
    loader = data.train_dataloader()
    loader.batch_sampler.done = lambda: done
    loader.batch_sampler.total = done + epochs * loader.batch_sampler.per_epoch
    return [row for batch in loader for row in zip(batch["prompts"], batch["seeds"], strict=True)]


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        ("a.txt", "one\r\n\n  two  \nthree", {}, ["one", "two", "three"]),
        ("plain", "one\ntwo\n", {}, ["one", "two"]),
        ("bom.txt", "\ufeffone\ntwo", {}, ["one", "two"]),
        ("separator.txt", "a\u2028b\x0cc\nd\x85e", {}, ["a\u2028b\x0cc", "d\x85e"]),
        ("a.csv", 'Prompt,raw_data\n"one, two","{""a"": 1}"\n"line\nbreak",\n,x\n', {}, ["one, two", "line\nbreak"]),
        ("other.csv", "id,text\n1,one\n2,two\n", {"column": "text"}, ["one", "two"]),
        ("a.tsv", "Prompt\tCategory\none, two\tx\n", {}, ["one, two"]),
        ("a.json", '["one", {"prompt": "two"}]', {}, ["one", "two"]),
        ("a.jsonl", '{"prompt": "one\u2028more"}\n\n"two"\n', {}, ["one\u2028more", "two"]),
        ("limit.txt", "one\ntwo\nthree", {"limit": 2}, ["one", "two"]),
    ],
)
def test_prompt_files(name, text, options, expected, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name, **options) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n  \n\t\n", "holds no prompt"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"not UTF-8 \(byte 3\).*iconv"),
        ("table.csv", b"id,text\n1,one\n", "no column 'prompt': it has id, text"),
        ("empty.csv", b"", "no column 'prompt': it has none"),
        ("broken.json", b'["one"', "broken.json is not json"),
        ("object.json", b'{"prompt": "one"}', "holds a dict, accepted: a list"),
        ("rows.jsonl", b'{"text": "one"}\n', "row without a text under 'prompt'"),
        ("numbers.json", b"[1, 2]", "row without a text"),
        ("prompts.xlsx", b"one", "unknown kind of prompt file '.xlsx', accepted: .txt"),
    ],
)
def test_bad_prompt_files_have_one_clear_error(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(tmp_path / name)


def test_no_such_prompt_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file .*absent.txt: a text file with a prompt a line"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path)


def test_a_file_is_split_without_overlap_by_a_fixed_shuffle():
    parts = split_prompts(PROMPTS * 2, dev=4, heldout=8)
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "dev": 4, "heldout": 8}
    assert sorted(sum(parts.values(), [])) == sorted(PROMPTS)
    assert parts == split_prompts(PROMPTS, dev=4, heldout=8)


@pytest.mark.parametrize(("dev", "heldout"), [(4, 20), (24, 0), (30, 30)])
def test_too_few_prompts_for_the_splits(dev, heldout):
    with pytest.raises(ValueError, match="24 distinct prompts do not give .* give more prompts, or lower these"):
        split_prompts(PROMPTS, dev, heldout)


def test_a_prompt_in_two_splits_is_refused():
    with pytest.raises(ValueError, match="1 prompts are in both train and heldout, for example 'a'"):
        PromptData(["a", "b"], heldout=["a"])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"seeds_per_prompt": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match="accepted: 1 or more"):
        PromptData(PROMPTS, **options)


def test_no_prompt_and_no_full_batch_are_refused():
    with pytest.raises(ValueError, match="no prompt to train on"):
        PromptData([])
    with pytest.raises(ValueError, match=r"24 training prompts do not fill one batch of prompts.batch_size=25 x 1"):
        PromptData(PROMPTS, batch_size=25).train_dataloader()
    with pytest.raises(ValueError, match="x 4 processes"):
        EpochBatches(PromptData(PROMPTS, batch_size=8), rank=0, world=4)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_noise_is_bit_equal_for_any_batch_size_and_number_of_workers(batch_size, workers):
    """24 rows fill batches of 1, 3 and 8: the same prompts meet the same noise in the same order."""
    reference = rows(PromptData(PROMPTS, batch_size=24))
    found = rows(PromptData(PROMPTS, batch_size=batch_size, workers=workers))
    assert found == reference
    noise = [gaussian([seed], (4, 8, 8)) for _, seed in found]
    whole = gaussian([seed for _, seed in reference], (4, 8, 8))
    assert torch.equal(torch.cat(noise), whole)


def test_a_row_keeps_its_noise_wherever_it_stands_in_a_batch():
    """The order of an epoch is its own; a row's seed is the row's and the epoch's."""
    data = PromptData(PROMPTS, batch_size=4)
    first, second = rows(data), rows(data, epochs=2)[24:]
    assert dict(first).keys() == dict(second).keys() and [p for p, _ in first] != [p for p, _ in second]
    assert all(dict(first)[prompt] != dict(second)[prompt] for prompt in PROMPTS)
    repeated = PromptData(PROMPTS, batch_size=4, seeds_per_prompt=1)
    assert dict(rows(repeated)) == dict(rows(repeated, epochs=2)[24:]) == dict(first)


def test_the_run_seed_changes_order_and_noise():
    one, two = rows(PromptData(PROMPTS, seed=0)), rows(PromptData(PROMPTS, seed=1))
    assert [p for p, _ in one] != [p for p, _ in two] and set(dict(one).values()).isdisjoint(dict(two).values())


@pytest.mark.parametrize("done", range(1, 14))
def test_any_batch_can_be_the_next_one(done):
    """Also across an epoch's end: 5 batches an epoch, the last one short of prompts and so dropped."""
    data = PromptData(PROMPTS[:22], batch_size=4)
    uninterrupted = rows(data, epochs=4)
    assert len(uninterrupted) == 4 * 5 * 4
    assert rows(data, done=done)[: 4 * 5] == uninterrupted[4 * done : 4 * (done + 5)]


def test_a_run_of_steps_is_one_long_epoch_for_lightning():
    sampler = EpochBatches(PromptData(PROMPTS, batch_size=8), total=7)
    assert len(sampler) == 7 == len(list(sampler)) and sampler.per_epoch == 3
    assert len(EpochBatches(PromptData(PROMPTS, batch_size=8))) == 3


def test_ranks_share_one_global_batch():
    whole = list(EpochBatches(PromptData(PROMPTS, batch_size=8)))
    data = PromptData(PROMPTS, batch_size=4)
    shares = [list(EpochBatches(data, rank, 2)) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_what_is_sent_to_workers_is_plain_data():
    """A worker that is spawned (macOS) gets a pickle: neither the trainer nor a model belongs in it."""
    data = PromptData(PROMPTS)
    data.note = lambda: None  # cannot be pickled
    loader = data.train_dataloader()
    assert len(pickle.dumps((loader.dataset, loader.collate_fn))) < 5000


def test_validation_rows_have_one_fixed_seed_each():
    data = PromptData(["a", "b"], dev=["c", "d", "e"], batch_size=2, seed=5)
    loader = data.val_dataloader()
    assert isinstance(loader, DataLoader)
    (batch,) = list(loader)
    assert batch == {"prompts": ["c", "d", "e"], "seeds": [fixed_seed(0), fixed_seed(1), fixed_seed(2)]}


def test_shapes_splits_share_no_drawings_and_do_not_depend_on_the_seed():
    data, other = (PromptData.shapes(train=400, dev=40, heldout=60, seed=seed) for seed in (0, 1))
    for name, texts in data.splits.items():
        assert len(set(texts)) == len(texts)
        assert {split_of(read(text)) for text in texts} == {name}
    assert data.splits["dev"] == other.splits["dev"] and data.splits["heldout"] == other.splits["heldout"]
    assert data.splits["train"] != other.splits["train"]
    longer = PromptData.shapes(train=8, dev=80, heldout=60)
    assert longer.splits["dev"][:40] == data.splits["dev"]


def test_long_prompts_are_told_once_with_their_number():
    import tc_lightning as tc

    backbone = tc.Backbone.load("tiny")
    data = PromptData(["a red circle", "a red circle " * 20, "a blue cross " * 20])
    limit = backbone.tokenizer.model_max_length
    with pytest.warns(UserWarning, match=f"2 of 3 prompts have more than {limit} tokens: the tokenizer cuts them") as caught:
        assert data.warn_about_length(backbone.token_counts, limit) == 2
    assert len(caught) == 1
    assert data.splits["train"][1] == "a red circle " * 20


def test_prompts_survive_a_round_through_json(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(PROMPTS))
    assert PromptData.file(tmp_path / "all.json", dev=4, heldout=4).splits == split_prompts(PROMPTS, 4, 4)


def csv_of(prompts, path):
    """As Python's csv writer quotes them, with a second column."""
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "raw_data"), *((prompt, f'{{"a": "{n}\n"}}') for n, prompt in enumerate(prompts))])
    return path


HARD = ["plain", 'with "quotes", and commas', "two\nlines", "naïve 猫 \u2028 end", "  spaces ", "last"]


@pytest.mark.parametrize("chunk", [1, 7, 2**24])
@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_rows_of_a_stream_are_those_that_are_read_whole(ending, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "CHUNK", chunk)
    path = csv_of(HARD, tmp_path / "a.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", ending.encode()))
    streamed = StreamedPrompts(path)
    assert list(streamed) == read_prompts(path) == [prompt.strip() for prompt in HARD]
    assert streamed[-1] == "last" and streamed[1:3] == list(streamed)[1:3] and len(streamed) == 6
    assert list(pickle.loads(pickle.dumps(streamed))) == list(streamed)
    assert list(StreamedPrompts(path, limit=2)) == read_prompts(path, limit=2)


@pytest.mark.parametrize("text", ["one\n\n  two \r\nthree", "one\ntwo\nthree\n\n"])
def test_lines_of_a_stream(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    streamed = StreamedPrompts(tmp_path / "a.txt")
    assert dict.fromkeys(streamed) == dict.fromkeys(read_prompts(tmp_path / "a.txt")), "a blank row stands for the next one"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id,text\n1,one\n", "no column 'prompt': it has id, text"),
        (b"prompt\n", "holds no prompt"),
        (b"prompt\n\n  \n", "holds no prompt"),
        (b'prompt\n"one\ntwo\n', "a quote that is never closed"),
        ("prompt\ncafé".encode("latin-1"), r"not UTF-8 \(byte 10\).*iconv"),
    ],
)
def test_a_bad_large_file_has_one_clear_error(content, words, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        StreamedPrompts(tmp_path / "a.csv")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_large_file_is_split_without_overlap_and_its_batches_are_numbered(workers, tmp_path, monkeypatch):
    """Duplicates of what is held out are not trained on either; any batch can be the next one."""
    monkeypatch.setattr(prompt_files, "LARGE", 1)
    path = csv_of(PROMPTS * 3, tmp_path / "a.csv")
    data = PromptData.file(path, dev=4, heldout=8, batch_size=4, workers=workers)
    aside = {*data.splits["dev"], *data.splits["heldout"]}
    assert len(aside) == 12 and isinstance(data.splits["train"], StreamedPrompts)
    whole = rows(data, epochs=2)
    assert len(whole) == 2 * 72 and {prompt for prompt, _ in whole} == set(PROMPTS) - aside
    assert rows(data, done=20)[: 4 * 16] == whole[80 : 80 + 64]
    assert PromptData.file(path, dev=4, heldout=8, seed=5).splits["dev"] == data.splits["dev"]
    digest = data.splits["train"].digest()
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number 8"))
    assert PromptData.file(path, dev=4, heldout=8).splits["train"].digest() != digest
    with pytest.raises(ValueError, match="23 distinct prompts do not give .* give more prompts, or lower these"):
        PromptData.file(path, dev=4, heldout=20)


def test_of_a_large_file_only_the_places_of_rows_stay_in_memory(tmp_path, monkeypatch):
    """8 bytes a row, 8 more for an epoch's order; not the text."""
    import tracemalloc

    monkeypatch.setattr(prompt_files, "LARGE", 1)
    monkeypatch.setattr(prompt_files, "CHUNK", 2**18)
    count = 20_000
    (tmp_path / "a.csv").write_text("prompt,raw_data\n" + "".join(f'"a circle, number {n}","{"x" * 200}"\n' for n in range(count)))
    tracemalloc.start()
    try:
        data = PromptData.file(tmp_path / "a.csv", dev=4, heldout=4, batch_size=4)
        batch = next(iter(data.train_dataloader()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(batch["prompts"]) == 4 and len(data.splits["train"]) == count
    size = (tmp_path / "a.csv").stat().st_size
    assert peak < 3 * 8 * count + 6 * 2**18 < size / 2
