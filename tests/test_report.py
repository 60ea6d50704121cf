"""Scores: means with intervals against known ones, the paired comparison, csv and markdown."""

import csv
import math

import numpy as np
import pytest

from tc_lightning.report import Scores, bootstrap


@pytest.fixture
def scores():
    made, rng = Scores(), np.random.default_rng(0)
    base = rng.normal(size=200)
    prompts = [f"prompt {index}" for index in range(200)]
    made.add("before", prompts, range(200), {"total": base, "oracle": np.zeros(200)})
    made.add("after", prompts, range(200), {"total": base + rng.normal(0.1, 0.2, 200), "oracle": np.ones(200)})
    return made


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap(values) == interval
    assert bootstrap(np.ones(5)) == (1.0, 1.0, 1.0)
    assert math.isnan(bootstrap(np.array([])).mean)


def test_paired_difference_is_far_narrower_than_the_two_means(scores):
    paired = scores.paired("total", "before", "after")
    assert paired.low > 0 and paired.mean == pytest.approx(0.1, abs=0.04)
    before, after = (scores.mean(model, "total") for model in ("before", "after"))
    assert before.high > after.low and paired.high - paired.low < (before.high - before.low) / 3
    assert scores.paired("oracle", "before", "after") == (1.0, 1.0, 1.0)


def test_models_scored_on_other_rows_are_not_compared(scores):
    scores.add("short", ["prompt 0"], [0], {"total": [1.0], "oracle": [1.0]})
    with pytest.raises(ValueError, match="before and short were not scored on the same prompts and seeds"):
        scores.paired("total", "before", "short")
    with pytest.raises(ValueError):
        scores.add("x", ["a", "b"], [0], {"total": [1.0, 2.0]})


def test_names_come_in_their_order(scores):
    assert scores.models == ["before", "after"] and scores.rewards == ["total", "oracle"]
    assert scores.column("after", "oracle").tolist() == [1.0] * 200


def test_csv_has_a_row_an_image(scores, tmp_path):
    scores.add("other", ['a "red", circle\nand more'], [7], {"total": [0.5], "oracle": [1.0]}, category="odd")
    file = scores.save(tmp_path / "new" / "scores.csv")
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == ["model", "prompt", "category", "seed", "total", "oracle"] and len(rows) == 401
    assert rows[-1]["prompt"] == 'a "red", circle\nand more' and rows[-1]["category"] == "odd" and rows[-1]["seed"] == "7"
    assert float(rows[0]["total"]) == scores.column("before", "total")[0]


def test_markdown_shows_means_and_the_difference(scores):
    lines = scores.markdown().splitlines()
    assert lines[0] == "| model | total | oracle |"
    assert lines[2].startswith("| before | ") and lines[2].endswith("| 0.0000 [0.0000, 0.0000] |")
    assert lines[4].startswith("| after - before | 0.") and lines[4].endswith("| 1.0000 [1.0000, 1.0000] |")
