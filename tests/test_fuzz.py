"""Malformed prompt files, checkpoints and overrides: one line that names the file or key, status 1 or 2, nothing harmed."""

import contextlib
import csv
import io
import json
import re
import string

import pytest
import torch
from small_runs import door

pytest.importorskip("hypothesis", reason="hypothesis is not installed (extra dev)")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tc_lightning.backbone import Backbone  # noqa: E402
from tc_lightning.checkpoint_io import read_checkpoint  # noqa: E402
from tc_lightning.cli.errors import plain_errors  # noqa: E402
from tc_lightning.prompts import PromptData  # noqa: E402
from tc_lightning.trainable import check_names  # noqa: E402

# what an error may be about; a kind is told apart by its words
KINDS = {
    "absent": "no prompt file|no checkpoint",
    "encoding": "not UTF-8",
    "empty": "holds no prompt",
    "column": "has no column",
    "syntax of the file": r"is not (json|jsonl|csv|tsv)",
    "type of the file": "accepted: a list of prompts",
    "row": "has a row without a text",
    "half a character": "half a character",
    "kind of file": "unknown kind of prompt file",
    "too few": "distinct prompts do not give",
    "unreadable checkpoint": "no readable checkpoint",
    "not a training checkpoint": "no training checkpoint",
    "names": "of another run",
    "shapes": r"the checkpoint's \S+ is \(",
    "unknown option": r"no \w+=\S*: accepted are",
    "unknown key": "no key '",
    "number": "accepted is a (whole )?number",
    "override's grammar": "Error parsing override|mismatched|token recognition|extraneous|no viable alternative|LexerNo",
    "composition": "Could not|In '|not in struct|Error merging|Ambiguous|Multiple values|Unsupported",
    "secret": "holds a secret",
}
BOUNDED = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
seen: dict[str, int] = {}
counts = {"malformed": 0, "valid": 0}


def refused_in_one_line(status, err, *names):
    """One `error:` line that names the file or key, status 1 or 2, no traceback; notes its kind."""
    assert status in (1, 2), err
    lines = [line for line in err.strip().splitlines() if not line.startswith("(HYDRA_FULL_ERROR")]
    assert "Traceback" not in err and lines and lines[0].startswith("error: ") and err.count("error: ") == 1, err
    assert any(name in err for name in names), (names, err)
    kind = next((kind for kind, words in KINDS.items() if re.search(words, err)), None)
    assert kind is not None, err
    seen[kind] = seen.get(kind, 0) + 1
    counts["malformed"] += 1


def caught(call):
    """(status, stderr) of a call as the command line ends it."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), plain_errors("train"):
            call()
    except SystemExit as stop:
        return stop.code, err.getvalue()
    return 0, err.getvalue()


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(str.strip)
PROMPTS = st.lists(TEXT, min_size=6, max_size=12, unique_by=str.strip)


def written(prompts, suffix, column="prompt"):
    """Prompts as a file of a kind."""
    if suffix in (".csv", ".tsv"):
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",")
        table.writerows([[column, "other"], *([prompt, "x"] for prompt in prompts)])
        return text.getvalue()
    if suffix == ".json":
        return json.dumps([{column: prompt} if index % 2 else prompt for index, prompt in enumerate(prompts)])
    if suffix == ".jsonl":
        return "\n".join(json.dumps({column: prompt}) for prompt in prompts)
    return "\n".join(prompts)


SUFFIXES = st.sampled_from([".txt", ".csv", ".tsv", ".json", ".jsonl"])


@st.composite
def malformed_prompts(draw):
    """(suffix, bytes or None for no file): something is wrong with it."""
    prompts, suffix = draw(PROMPTS), draw(SUFFIXES)
    content = written(prompts, suffix).encode()
    how = draw(st.sampled_from(["absent", "bytes", "blank", "column", "cut", "type", "row", "surrogate", "suffix", "few", "field"]))
    place = draw(st.integers(0, len(content)))
    if how == "absent":
        return suffix, None
    if how == "bytes":
        return suffix, content[:place] + b"\xff\xfe\xfd" + content[place:]
    if how == "blank":
        return suffix, draw(st.sampled_from([b"", b"\n\n", b" \r\n\t", b"\xef\xbb\xbf"]))
    if how == "column":
        name = draw(st.text(string.ascii_letters, min_size=1, max_size=9).filter(lambda word: word.lower() != "prompt"))
        return draw(st.sampled_from([".csv", ".tsv"])), written(prompts, ".csv", name).replace(",", "\t").encode()
    if how == "cut":
        whole = written(prompts, ".json").encode("ascii")
        return ".json", whole[: draw(st.integers(1, len(whole) - 1))]
    if how == "type":
        return ".json", json.dumps(draw(st.one_of(st.integers(), st.text("abc"), st.booleans(), st.just({"prompt": "a"})))).encode()
    if how == "row":
        bad = draw(
            st.one_of(st.integers(), st.none(), st.lists(st.integers(), max_size=2), st.just({"text": "a"}), st.just({"prompt": 3}))
        )
        return ".json", json.dumps([*prompts, bad]).encode()
    if how == "surrogate":
        return ".jsonl", b'"a \\ud83d b"\n' + b"\n".join(json.dumps(prompt).encode() for prompt in prompts)
    if how == "suffix":
        name = draw(st.text(string.ascii_lowercase, min_size=1, max_size=5))
        return f".{name}q", content
    if how == "few":
        few = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
        return ".txt", "\n".join(few).encode()
    return ".csv", b'prompt\n"' + b"a" * (csv.field_size_limit() + 1) + b'"\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def data(path):
    return caught(lambda: PromptData.file(path, dev=2, heldout=2, batch_size=1))


@pytest.mark.full
@settings(max_examples=340, **BOUNDED)
@given(case=malformed_prompts())
def test_malformed_prompt_files(case, place):
    suffix, content = case
    path = place / f"prompts{suffix}"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    status, err = data(path)
    refused_in_one_line(status, err, str(path), "val.prompts")
    assert not path.exists() or path.read_bytes() == content


@pytest.mark.full
@settings(max_examples=60, **BOUNDED)
@given(prompts=PROMPTS, suffix=SUFFIXES, column=st.sampled_from(["prompt", "Prompt", "PROMPT"]), mark=st.booleans())
def test_well_formed_prompt_files_of_every_kind_are_taken(prompts, suffix, column, mark, place):
    if suffix in (".json", ".jsonl"):
        column = "prompt"
    lines = [" ".join(prompt.split()) for prompt in prompts]
    if len(set(lines)) < 5 or suffix == ".txt" and any(re.search(r"[\n\r]", line) for line in lines):
        return
    path = place / f"good{suffix}"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + written(lines, suffix, column).encode())
    found = PromptData.file(path, dev=2, heldout=2, batch_size=1)
    assert sorted(sum(found.splits.values(), [])) == sorted({line.strip() for line in lines})
    counts["valid"] += 1


@pytest.fixture(scope="module")
def model():
    return Backbone.load("tiny").tune("full")


@pytest.fixture(scope="module")
def good(model, place):
    """A checkpoint as a run writes it, in bytes and as data."""
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    held = {"state_dict": state, "optimizer_states": [], "global_step": 3, "loops": {}, "lr_schedulers": []}
    torch.save(held, place / "good.ckpt")
    return (place / "good.ckpt").read_bytes(), held


def load(path, model):
    return caught(lambda: check_names(read_checkpoint(path)["state_dict"], model))


@pytest.mark.full
@settings(max_examples=150, **BOUNDED)
@given(draw=st.data())
def test_malformed_checkpoints(draw, good, model, place):
    content, held = good
    path = place / "bad.ckpt"
    how = draw.draw(st.sampled_from(["cut", "flip", "noise", "drop", "rename", "shape", "kind", "keys", "absent"]))
    names = list(held["state_dict"])
    name = draw.draw(st.sampled_from(names))
    state = dict(held["state_dict"])
    path.unlink(missing_ok=True)
    if how == "cut":
        path.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1))])
    elif how == "flip":
        changed, where = bytearray(content), draw.draw(st.integers(len(content) // 10, len(content) * 9 // 10))
        changed[where] ^= 1 << draw.draw(st.integers(0, 7))
        path.write_bytes(changed)
    elif how == "noise":
        path.write_bytes(draw.draw(st.binary(max_size=200)))
    elif how == "kind":
        torch.save(draw.draw(st.one_of(st.integers(), st.text(), st.lists(st.integers()))), path)
    elif how == "keys":
        torch.save({key: value for key, value in held.items() if key not in ("loops", "global_step")}, path)
    elif how != "absent":
        value = state.pop(name)
        if how == "rename":
            state[name + draw.draw(st.text("abc", min_size=1, max_size=4))] = value
        if how == "shape":
            state[name] = value.unsqueeze(0) if draw.draw(st.booleans()) else value.flatten()[:-1]
        torch.save({**held, "state_dict": state}, path)
    before = path.read_bytes() if path.exists() else None
    status, err = load(path, model)
    if how == "flip" and status == 0:  # the few bytes of padding between records mean nothing
        assert all(torch.equal(value, held["state_dict"][key]) for key, value in read_checkpoint(path)["state_dict"].items())
        return
    refused_in_one_line(status, err, str(path), name, "checkpoint")
    assert (path.read_bytes() if path.exists() else None) == before


@pytest.mark.full
def test_a_whole_checkpoint_is_taken(good, model, place):
    assert load(place / "good.ckpt", model) == (0, "")
    counts["valid"] += 1


WORD = st.text(string.ascii_lowercase, min_size=1, max_size=6)
NUMBER = st.sampled_from(
    ["seed", "max_steps", "checkpoint_every", "val.every", "chain.steps", "optimizer.lr", "guard.nonfinite_steps"]
)
GROUP = st.sampled_from(["reward", "schedule", "constraint", "backbone", "prompts", "trainer", "logger", "callbacks", "experiment"])
MALFORMED = st.one_of(
    st.tuples(WORD, WORD).map(lambda pair: f"{pair[0]}q.{pair[1]}=1"),
    st.tuples(GROUP, WORD).map(lambda pair: f"{pair[0]}={pair[1]}zq"),
    st.tuples(NUMBER, WORD).map(lambda pair: f"{pair[0]}=x{pair[1]}"),
    st.tuples(st.sampled_from(["max_steps", "chain.steps", "val.every"]), st.integers(-99, -1)).map(lambda p: f"{p[0]}={p[1]}"),
    st.tuples(NUMBER, st.sampled_from(["[1", "{a", "'b", "1]", "${"])).map(lambda pair: f"{pair[0]}={pair[1]}"),
    WORD.map(lambda word: f"chain.{word}q=2"),
    st.sampled_from(["chain", "~nothing", "+seed=1", "reward=[tiny_clip"]),
    WORD.map(lambda word: f"+{word}.api_key={word}"),
)
VALID = st.tuples(
    st.integers(0, 99).map(lambda n: f"seed={n}"),
    st.sampled_from(["reward=[tiny_clip]", "reward=[tiny_preference,tiny_aesthetic]", "constraint=none", "schedule=full"]),
    st.floats(1e-6, 1e-2).map(lambda x: f"optimizer.lr={x}"),
    st.integers(1, 50).map(lambda n: f"chain.steps={n}"),
    st.sampled_from(["trainer=gpu", "trainer=ddp", "logger=[csv]", "logger=none", "callbacks=watched", "tune.unet=lora"]),
)


def overrides(count, place, valid):
    """`count` malformed overrides against a folder that holds a run, which stays as it is; then `valid` well-formed ones."""
    folder = place / "exists"
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text('{"status": "finished"}')

    @settings(max_examples=count, **BOUNDED)
    @given(word=MALFORMED)
    def malformed(word):
        done = door("train", word, f"hydra.run.dir={folder}", "hydra.output_subdir=null")
        key = word.lstrip("+~").partition("=")[0]
        refused_in_one_line(done.status, done.err, key, key.rpartition(".")[2], word)
        assert (folder / "run.json").read_text() == '{"status": "finished"}'

    @settings(max_examples=valid, **BOUNDED)
    @given(words=VALID)
    def well_formed(words):
        done = door("train", *words, "--cfg", "job")
        assert done.status == 0 and f"seed: {words[0][5:]}\n" in done.out, done.err
        counts["valid"] += 1

    malformed()
    well_formed()
    assert {file.name for file in folder.iterdir()} <= {"run.json", "train.log", ".lock"}


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_many_malformed_overrides(place):
    overrides(300, place, 40)


@pytest.mark.full
def test_there_were_enough_of_all_kinds(request):
    """The counts of this file's tests, where all of its fast ones were run here."""
    if min(counts.values()) == 0 or counts["malformed"] < 400:
        pytest.skip("the other tests of this file ran elsewhere or not at all")
    assert counts["malformed"] >= 400 and counts["valid"] >= 50
    assert len(seen) >= 8, seen
