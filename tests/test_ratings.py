"""Blind human evaluation: pairs from what evaluate wrote, answers that survive a crash, win rates against closed forms."""

import csv
import json
import sys

import pytest
import torch
from scipy.stats import binomtest

from tc_lightning import markup
from tc_lightning.pixels import save_png
from tc_lightning.ratings import Ratings, markdown, read_answers, read_pairs, wilson, win_rates
from tc_lightning.report import Scores

PROMPTS = [f"prompt {number}" for number in range(6)]


def evaluation(folder, models=("base", "a/b"), seeds=2, kept=6):
    """A run folder as evaluate leaves it, with images of one colour a model."""
    scores = Scores()
    for number, model in enumerate(models):
        rows = [(prompt, 10 * row + seed) for row, prompt in enumerate(PROMPTS) for seed in range(seeds)]
        scores.add(model, *zip(*rows, strict=True), {"clip": [0.5] * len(rows)})
        names = [f"{row:05d}_{seed}" for row in range(kept) for seed in range(seeds)]
        save_png(torch.full((len(names), 3, 4, 4), number / 4), folder / "images" / model.replace("/", "_"), names)
    scores.save(folder / "scores.csv")
    (folder / "evaluation.json").write_text(json.dumps({"models": list(models), "seeds": seeds}))
    return folder


class TestPairs:
    def test_one_a_prompt_and_seed_on_sides_of_a_coin(self, tmp_path):
        pairs = read_pairs(evaluation(tmp_path))
        wanted = [(prompt, 10 * row + seed) for row, prompt in enumerate(PROMPTS) for seed in (0, 1)]
        assert sorted((pair.prompt, pair.seed) for pair in pairs) == wanted
        assert {pair.left for pair in pairs} == {"base", "a/b"}, "each model is left sometimes"
        for pair in pairs:
            row, number = PROMPTS.index(pair.prompt), pair.seed % 10
            assert {pair.left, pair.right} == {"base", "a/b"}
            assert pair.left_file == tmp_path / "images" / pair.left.replace("/", "_") / f"{row:05d}_{number}.png"

    def test_order_and_sides_are_the_raters_own_and_stay(self, tmp_path):
        folder = evaluation(tmp_path)
        one, again, other = read_pairs(folder, "1"), read_pairs(folder, "1"), read_pairs(folder, "2")
        assert one == again and one != other and {p.key for p in one} == {p.key for p in other}

    def test_every_model_against_the_first(self, tmp_path):
        pairs = read_pairs(evaluation(tmp_path, ("base", "x", "y"), seeds=1, kept=3))
        assert sorted(pair.key for pair in pairs) == [f"{model}/{row:05d}_0" for model in "xy" for row in range(3)]
        assert len(read_pairs(tmp_path, limit=4)) == 4

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda folder: (folder / "scores.csv").unlink(), "no finished evaluation"),
            (lambda folder: evaluation(folder, ("base",)), "needs two models"),
            (lambda folder: [file.unlink() for file in folder.glob("images/base/*")], "no image that two models have"),
            (lambda folder: (folder / "evaluation.json").write_text('{"seeds": 5}'), "do not belong together"),
        ],
    )
    def test_what_cannot_be_rated(self, damage, message, tmp_path):
        damage(evaluation(tmp_path))
        with pytest.raises(ValueError, match=message):
            read_pairs(tmp_path)

    def test_the_page_shows_no_name(self, tmp_path):
        pair = read_pairs(evaluation(tmp_path))[0]
        shown = markup.question(pair, "quality", "0", 0, 24)
        assert "base" not in shown.replace("base64", "") and "a/b" not in shown and "a_b" not in shown and pair.prompt in shown


class TestAnswers:
    @pytest.fixture
    def pairs(self, tmp_path):
        return read_pairs(evaluation(tmp_path / "evaluation"))

    def test_each_is_on_the_disk_at_once(self, pairs, tmp_path):
        ratings = Ratings(pairs, tmp_path / "r" / "ratings.csv")
        assert ratings.answer(ratings.token, "left")
        rows = list(csv.DictReader((tmp_path / "r" / "ratings.csv").open()))
        first = pairs[0]
        assert len(rows) == 1 and rows[0]["winner"] == first.left and rows[0]["prompt"] == first.prompt
        assert ratings.current == (first, "alignment")

    def test_an_answer_to_what_was_not_asked_is_not_written(self, pairs, tmp_path):
        ratings = Ratings(pairs, tmp_path / "ratings.csv")
        token = ratings.token
        assert ratings.answer(token, "tie") and not ratings.answer(token, "tie") and not ratings.answer("", "tie")
        assert len(read_answers(tmp_path / "ratings.csv")) == 1
        with pytest.raises(ValueError, match="accepted: left, tie, right"):
            ratings.answer(ratings.token, "both")

    def test_goes_on_after_a_crash_that_cut_a_line(self, pairs, tmp_path):
        file = tmp_path / "ratings.csv"
        ratings = Ratings(pairs, file)
        for answer in ("left", "right", "tie"):
            ratings.answer(ratings.token, answer)
        lines = file.read_text()
        file.write_text(lines[: lines.rstrip().rindex(",") - 12])  # in the middle of the third answer
        again = Ratings(pairs, file)
        assert again.current == (pairs[1], "quality")
        again.answer(again.token, "right")
        assert [row["answer"] for row in read_answers(file)] == ["left", "right", "right"]

    def test_back_asks_again_and_the_new_answer_counts(self, pairs, tmp_path):
        ratings = Ratings(pairs, tmp_path / "ratings.csv")
        ratings.answer(ratings.token, "left")
        ratings.back()
        ratings.answer(ratings.token, "right")
        (row,) = read_answers(tmp_path / "ratings.csv")
        assert row["winner"] == pairs[0].right

    def test_raters_do_not_see_each_others_answers(self, pairs, tmp_path):
        one = Ratings(pairs, tmp_path / "ratings.csv", "anna")
        one.answer(one.token, "left")
        assert Ratings(pairs, tmp_path / "ratings.csv", "ben").position == 0
        assert Ratings(pairs, tmp_path / "ratings.csv", "anna").position == 1

    def test_to_the_end(self, pairs, tmp_path):
        ratings = Ratings(pairs[:2], tmp_path / "ratings.csv")
        while ratings.current:
            ratings.answer(ratings.token, "tie")
        assert ratings.position == 4 and not ratings.answer(ratings.token, "left")


class TestWinRates:
    def test_wilson_is_scipys(self):
        for wins, count in ((0, 5), (3, 7), (40, 40), (71, 100)):
            wanted = binomtest(wins, count).proportion_ci(method="wilson")
            assert wilson(wins / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-6)

    def test_counts_and_rate(self, tmp_path):
        pairs = read_pairs(evaluation(tmp_path / "e", seeds=1))
        ratings = Ratings(pairs, tmp_path / "ratings.csv")
        while ratings.current:
            pair, question = ratings.current
            mine = "left" if pair.left == "a/b" else "right"
            other = {"left": "right", "right": "left"}[mine]
            row = PROMPTS.index(pair.prompt)
            ratings.answer(ratings.token, mine if question == "quality" and row < 4 else "tie" if row == 4 else other)
        quality, alignment = win_rates(read_answers(tmp_path / "ratings.csv"))
        assert (quality.model, quality.base, quality.wins, quality.ties, quality.losses) == ("a/b", "base", 4, 1, 1)
        assert quality.rate.mean == pytest.approx(4.5 / 6) and alignment.rate.mean == pytest.approx(0.5 / 6)
        assert quality.rate[1:] == pytest.approx(wilson(0.75, 6))
        assert "| a/b | base | quality | 75.0% [" in markdown([quality]) and "75.0% [" in markup.win_table([quality])

    def test_seeds_of_a_prompt_are_one_trial(self, tmp_path):
        pairs = read_pairs(evaluation(tmp_path / "e", seeds=2))
        ratings = Ratings(pairs, tmp_path / "ratings.csv")
        while ratings.current:
            pair, _ = ratings.current
            ratings.answer(ratings.token, "left" if pair.left == "a/b" else "right")
        quality = win_rates(read_answers(tmp_path / "ratings.csv"))[0]
        assert quality.wins == 12 and quality.rate[1:] == pytest.approx(wilson(1.0, 6))

    def test_none_yet(self):
        assert win_rates([]) == [] and "No answer yet" in markup.win_table([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give either images="),
        (["images=/nowhere"], "/nowhere holds no finished evaluation"),
        (["images=/nowhere", "run=[tiny,tiny]"], "give either images="),
    ],
)
def test_mistakes_of_the_verb_are_one_message(settings, message, tmp_path, monkeypatch, capsys):
    from tc_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tc_lightning", "rate", *settings])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.full
def test_rate_makes_its_images_in_two_processes(tmp_path, monkeypatch):
    """The second process is an evaluation, which has other defaults and does not know the keys of rate."""
    from small_runs import door

    from tc_lightning.cli import rate

    served = []
    monkeypatch.setattr(rate, "serve_until_stopped", lambda cfg, folder, mixing, ratings: served.append(ratings))
    small = ("bench.limit=2", "chain.steps=2", "micro_batch=2", "reward=[tiny_clip]", "processes=2", "rater=one", "limit=2")
    done = door("rate", "run=[tiny,tiny:aesthetic]", *small, f"hydra.run.dir={tmp_path / 'rated'}")
    assert done.status == 0, done.err
    assert len(served) == 1 and len(list((tmp_path / "rated" / "images").rglob("*.png"))) == 4
