"""Tables and plots of an evaluation: the numbers that they show, and that they can be read."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tc_lightning.report import Scores, bootstrap, group_means, plot_reward, summary
from tc_lightning.tables import evaluation_markdown, verdict


def scores(gain=0.5, models=("base", "tuned"), categories=("animals", "buildings"), seeds=2, prompts=20, noise=0.05):
    """Two rewards, one of which rises by `gain` and the other falls by half of it, and a measure."""
    rng = np.random.default_rng(0)
    made = Scores()
    for number, model in enumerate(models):
        for index in range(prompts):
            for seed in range(seeds):
                own = np.random.default_rng(100 * index + seed).normal(0, 1, 2)
                values = {
                    "pretty": [own[0] + number * gain + rng.normal(0, noise)],
                    "faithful": [own[1] - number * gain / 2 + rng.normal(0, noise)],
                    "diversity": [0.4 - 0.1 * number],
                }
                category = categories[index % len(categories)] if categories else ""
                made.add(model, [f"prompt {index}"], [seed], values, category)
    return made


def test_intervals_are_over_prompts_not_images():
    made = scores(seeds=3)
    means = [
        np.mean([row["pretty"] for row in made.rows if row["model"] == "base" and row["prompt"] == f"prompt {i}"])
        for i in range(20)
    ]
    wanted = bootstrap(np.array(means))._asdict()
    assert summary(made)["models"]["base"]["pretty"] == pytest.approx(wanted)
    assert len(made.over_seeds().rows) == 40


def test_paired_differences_and_wins():
    made = scores(noise=0.0)
    found = summary(made, ["diversity"])["against_base"]["tuned"]
    assert found["pretty"] == pytest.approx({"mean": 0.5, "low": 0.5, "high": 0.5, "wins": 1.0, "ties": 0.0})
    assert found["faithful"] == pytest.approx({"mean": -0.25, "low": -0.25, "high": -0.25, "wins": 0.0, "ties": 0.0})
    assert set(found["diversity"]) == {"mean", "low", "high"}
    assert scores(gain=0.0, noise=0.0).wins("pretty", "base", "tuned") == (0.0, 1.0)


def test_the_verdict_names_a_hacked_reward_and_lost_diversity():
    said = verdict(scores(), "tuned", ["pretty"], ["diversity"])
    assert "rose pretty; fell faithful (95 %)" in said
    assert "Trained on pretty." in said
    assert "**faithful fell while what was trained on rose" in said
    assert "75% of base's diversity" in said


def test_the_verdict_stays_calm():
    assert "hacked" not in verdict(scores(), "tuned", ["pretty", "faithful"], ["diversity"])  # both were trained on
    assert "hacked" not in verdict(scores(), "tuned", [], ["diversity"])  # not known
    still = verdict(scores(gain=0.0), "tuned", ["pretty"], ["diversity"])
    assert "rose nothing; fell nothing" in still


def test_markdown_shows_every_number_once_and_escapes_pipes():
    text = evaluation_markdown(scores(models=("base", "a|b")), "Bench x", ["a note"], ["diversity"])
    assert "20 prompts, 40 images a model" in text
    assert "a\\|b" in text
    for line in (line for line in text.splitlines() if line.startswith("|")):
        assert line.replace("\\|", "").count("|") in (3, 4, 6), line
    assert "## pretty by category" in text
    assert "## diversity by category" not in text
    assert "average of the categories" in text


def test_the_average_of_categories_weighs_them_alike():
    made = Scores()
    made.add("base", ["a", "b", "c"], [0] * 3, {"r": [1.0, 1.0, 1.0]}, "many")
    made.add("base", ["d"], [0], {"r": [3.0]}, "few")
    lines = evaluation_markdown(made, "x").splitlines()
    assert "| average of the categories |  | 2.0000 |" in lines


def test_no_category_no_category_table():
    assert "by category" not in evaluation_markdown(scores(categories=()), "x")


def test_saved_and_loaded(tmp_path):
    made = scores()
    assert Scores.load(made.save(tmp_path / "scores.csv")).rows == made.rows


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 5])
def test_a_plot_has_room_for_its_models_and_categories(count, tmp_path):
    models = [f"model number {i}" for i in range(count)]
    few, many = scores(models=models), scores(models=models, categories=[f"a category with a long name, {i}" for i in range(12)])
    pictures = [
        np.asarray(Image.open(plot_reward(s, "pretty", tmp_path / f"{i}.png")).convert("L")) for i, s in enumerate((few, many))
    ]
    assert pictures[1].shape[0] > pictures[0].shape[0]
    for picture in pictures:
        edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        assert all((edge == 255).all() for edge in edges)  # nothing is cut at the border
        assert (picture < 128).sum() > 500


def test_report_imports_nothing_heavy():
    code = "import sys, tc_lightning.report; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib", "transformers", "pytorch_lightning"} & set(done.stdout.split())


def test_groups_of_prompts_as_hpsv2_states_them():
    values = np.random.default_rng(0).normal(0.27, 0.02, 800)
    groups = values.reshape(10, 80).mean(1)
    assert group_means(values, 80) == pytest.approx((groups.mean(), groups.std()))
    made = scores(models=("base", "a", "b", "c"), seeds=1, prompts=8)
    text = evaluation_markdown(made, "title", group=2)
    first = [made.only("animals").column("base", "pretty")[i : i + 2].mean() for i in (0, 2)]
    assert f"| animals | {np.mean(first):.4f} ± {np.std(first):.4f} |" in text
    assert "| model | pretty | faithful | diversity |" in text  # with more than three models a row is a model
    assert "Groups of" not in evaluation_markdown(made, "title")
