"""Benches: prompts with categories from the shapes world, published files and a user's own."""

import json
import os
from collections import Counter

import pytest

from tc_lightning.benches import HPSV2_STYLES, Bench
from tc_lightning.prompts import PromptData
from tc_lightning.tiny.captions import read


@pytest.fixture(scope="module")
def shared(root):
    """Published prompt files, outside the checkout."""
    from pathlib import Path

    folder = Path(os.environ.get("TC_SHARED_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no published prompt files in {folder} (TC_SHARED_DATA)")
    return folder


def write_hpsv2(folder, count=20):
    folder.mkdir()
    for style in HPSV2_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(count)]))
    return folder


def test_shapes_are_the_held_out_prompts_of_training():
    bench = Bench.shapes()
    assert list(bench.prompts) == PromptData.shapes(train=8).splits["heldout"]
    for prompt, category in zip(bench.prompts, bench.categories, strict=True):
        assert category == {1: "one thing", 2: "two things"}[len(read(prompt).things)]


def test_parti(shared):
    bench = Bench.parti(shared / "PartiPrompts.tsv")
    assert len(bench) == 1632
    assert len(set(bench.categories)) == 12
    assert len(set(Bench.parti(shared / "PartiPrompts.tsv", by="Challenge").categories)) == 11
    assert (bench.prompts[0], bench.categories[0]) == ("bond", "Abstract")


def test_geneval(shared):
    bench = Bench.geneval(shared / "geneval_metadata.jsonl")
    assert len(bench) == 553
    assert len(set(bench.categories)) == 6
    assert bench.prompts[0] == "a photo of a bench"


def test_hpsv2_has_four_styles(tmp_path):
    bench = Bench.hpsv2(write_hpsv2(tmp_path / "hpsv2"))
    assert Counter(bench.categories) == dict.fromkeys(HPSV2_STYLES, 20)
    assert bench.group == bench.select(category="photo").group == 80


def test_a_limit_takes_as_many_from_each_category_and_keeps_the_order(tmp_path):
    folder = write_hpsv2(tmp_path / "hpsv2")
    bench = Bench.hpsv2(folder, limit=10)
    assert len(bench) == 10
    assert set(Counter(bench.categories).values()) == {2, 3}
    whole = Bench.hpsv2(folder)
    places = [whole.prompts.index(prompt) for prompt in bench.prompts]
    assert places == sorted(places)
    assert Bench.hpsv2(folder, category=["photo"], limit=3).prompts == ("photo 0", "photo 1", "photo 2")


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.tsv", "prompts.json", "prompts.jsonl"])
def test_files_of_every_kind(name, tmp_path):
    rows = [{"prompt": "a, cat", "kind": "animal"}, {"prompt": "ein Haus ü", "kind": "thing"}]
    text = {
        ".txt": "a, cat\nein Haus ü\n",
        ".csv": 'kind,prompt\nanimal,"a, cat"\nthing,ein Haus ü\n',
        ".tsv": "kind\tprompt\nanimal\ta, cat\nthing\tein Haus ü\n",
        ".json": json.dumps(rows),
        ".jsonl": "\n".join(map(json.dumps, rows)),
    }
    path = tmp_path / name
    path.write_text(text[path.suffix], encoding="utf-8")
    bench = Bench.file(path, category_column=None if path.suffix == ".txt" else "kind")
    assert bench.prompts == ("a, cat", "ein Haus ü")
    assert bench.name == "prompts"
    assert bench.categories == (("", "") if path.suffix == ".txt" else ("animal", "thing"))


def test_rows_without_a_prompt_have_no_category_either(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,kind\na cat,animal\n  ,nothing\na house,thing\n")
    assert Bench.file(path, category_column="kind").categories == ("animal", "thing")


def test_repeated_prompts_are_counted_and_told(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\na house\na cat\na cat\n")
    with pytest.warns(UserWarning, match="2 prompts are repetitions"):
        bench = Bench.file(path)
    assert bench.occurrences == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "has no column .prompt.: it has none"),
        (b"prompt,kind\n,x\n", {}, "holds no prompt"),
        (b"text,kind\na cat,x\n", {}, "has no column 'prompt': it has text, kind"),
        (b"prompt,kind\na cat,x\n", {"category_column": "style"}, "has no column 'style': it has prompt, kind"),
        (b"prompt,kind\na cat,x\n", {"category_column": "kind", "category": "y"}, "has no category 'y': it has x"),
        (b"prompt,kind\na cat,x\n", {"category": "y"}, "has no category 'y': it has none"),
        (b"prompt,kind\na cat,x\n", {"limit": 0}, "bench.limit=0: accepted: 1 or more"),
        (b"prompt\na caf\xe9\n", {}, "is not UTF-8"),
    ],
)
def test_bad_files(content, options, message, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Bench.file(path, **options)


def test_a_text_file_has_no_columns(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n")
    with pytest.raises(ValueError, match="category_column=kind needs .csv"):
        Bench.file(path, category_column="kind")


def test_bad_numbers():
    with pytest.raises(ValueError, match="bench shapes is empty"):
        Bench.shapes(count=0)
    with pytest.raises(ValueError, match="1 categories for 2 prompts"):
        Bench("x", ("a", "b"), ("c",))


@pytest.mark.parametrize(
    ("make", "source"),
    [
        (Bench.parti, "raw.githubusercontent.com/google-research/parti"),
        (Bench.geneval, "raw.githubusercontent.com/djghosh13/geneval"),
        (Bench.hpsv2, "anime.json of https://huggingface.co/datasets/zhwang/HPDv2"),
    ],
)
def test_what_cannot_be_fetched_says_from_where_and_which_key_helps(make, source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=source) as error:
        make()
    assert "bench.path=" in str(error.value)


def test_a_wrong_path_is_not_taken_for_a_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        Bench.parti(tmp_path / "none.tsv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        Bench.hpsv2(tmp_path / "none")
    (tmp_path / "some").mkdir()
    with pytest.raises(FileNotFoundError, match="has no anime.json"):
        Bench.hpsv2(tmp_path / "some")
