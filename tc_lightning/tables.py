"""The report of an evaluation in words and markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tc_lightning.report import Interval, Scores, group_means, summary


def verdict(scores: Scores, model: str, trained_on: Sequence[str], measures: Sequence[str] = ()) -> str:
    """One paragraph: what rose, what fell beyond its interval, and whether that looks like a hacked reward."""
    base, prompts = scores.models[0], scores.over_seeds()
    differences = {name: prompts.paired(name, base, model) for name in scores.rewards}
    rose = [name for name, value in differences.items() if value.low > 0 and name not in measures]
    fell = [name for name, value in differences.items() if value.high < 0 and name not in measures]
    said = [f"{model} against {base}: rose {', '.join(rose) or 'nothing'}; fell {', '.join(fell) or 'nothing'} (95 %)."]
    held = [name for name in fell if name not in trained_on]
    if trained_on:
        said.append(f"Trained on {', '.join(trained_on)}.")
        if held and any(name in trained_on for name in rose):
            said.append(f"**{', '.join(held)} fell while what was trained on rose: this is what a hacked reward looks like.**")
    narrow = differences.get("diversity")
    if narrow is not None and narrow.high < 0:
        share = 1 + narrow.mean / max(prompts.mean(base, "diversity").mean, 1e-12)
        said.append(f"Images of one prompt differ less: {share:.0%} of {base}'s diversity over seeds.")
    return " ".join(said)


def evaluation_markdown(scores: Scores, title: str, notes: Sequence[str] = (), measures: Sequence[str] = (), group: int = 0) -> str:
    """The report of an evaluation: means, paired comparison with the first model, every category.

    Args:
        group: of benches that state a category as the mean and spread of groups of so many prompts.
    """
    found = summary(scores, measures)
    base, models = found["base"], scores.models
    lines = [
        f"# {title}",
        "",
        f"{found['prompts']} prompts, {found['images']} images a model; intervals are 95 %, bootstrap over prompts.",
    ]
    lines += ["", *notes, "", "## Means", ""]
    lines += _means(found, scores.rewards)
    if len(models) > 2:
        lines += [
            "",
            f"## All models: mean, and difference to {base} on the same prompts and seeds",
            "",
            *_by_model(found, measures),
        ]
    for model in models[1:]:
        lines += ["", f"## {model} against {base}, same prompts and seeds", ""]
        rows = []
        for name, value in found["against_base"][model].items():
            wins = f"{value['wins']:.0%} (ties {value['ties']:.0%})" if "wins" in value else ""
            rows.append([name, _signed(Interval(value["mean"], value["low"], value["high"])), wins])
        lines += _table(["score", "difference", "images won"], rows)
    lines += _category_tables(scores, found, measures) if found["categories"] else []
    lines += _group_tables(scores, measures, group) if group else []
    return "\n".join(lines) + "\n"


def _means(found: dict, names: Sequence[str]) -> list[str]:
    """A row a score, or a row a model where there are more than three."""
    cells = {model: [str(Interval(**means[name])) for name in names] for model, means in found["models"].items()}
    if len(cells) > 3:
        return _table(["model", *names], [[model, *row] for model, row in cells.items()])
    return _table(["score", *cells], [[name, *row] for name, *row in zip(names, *cells.values(), strict=True)])


def _by_model(found: dict, measures: Sequence[str]) -> list[str]:
    """A row a model, a column a score, as papers have it."""
    names = [name for name in next(iter(found["models"].values())) if name not in measures]
    rows = []
    for model, means in found["models"].items():
        row = [f"{means[name]['mean']:.4f}" for name in names]
        for place, name in enumerate(names if model in found["against_base"] else ()):
            difference = found["against_base"][model][name]
            row[place] += f", {_signed(Interval(difference['mean'], difference['low'], difference['high']))}"
        rows.append([model, *row])
    return _table(["model", *names], rows)


def _category_tables(scores: Scores, found: dict, measures: Sequence[str]) -> list[str]:
    models, lines = scores.models, []
    sizes = {name: len(scores.only(name).over_seeds().rows) // len(models) for name in found["categories"]}
    for name in (name for name in scores.rewards if name not in measures):
        rows = []
        for category, means in found["categories"].items():
            part = scores.only(category).over_seeds()
            gains = [_signed(part.paired(name, models[0], model)) for model in models[1:]]
            rows.append([category, str(sizes[category]), *(f"{means[model][name]:.4f}" for model in models), *gains])
        averages = [float(np.mean([means[model][name] for means in found["categories"].values()])) for model in models]
        gains = [f"{value - averages[0]:+.4f}" for value in averages[1:]]
        rows.append(["average of the categories", "", *(f"{value:.4f}" for value in averages), *gains])
        lines += ["", f"## {name} by category", ""]
        lines += _table(["category", "prompts", *models, *(f"{model} - {models[0]}" for model in models[1:])], rows)
    return lines


def _group_tables(scores: Scores, measures: Sequence[str], group: int) -> list[str]:
    """Mean and spread over groups of consecutive prompts, as HPSv2's own program prints them."""
    lines = ["", f"## Groups of {group} prompts: mean and standard deviation of the groups' means"]
    for name in (name for name in scores.rewards if name not in measures):
        rows = []
        for category in scores.categories:
            part = scores.only(category).over_seeds()
            pairs = [group_means(part.column(model, name), group) for model in scores.models]
            rows.append([category, *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in pairs)])
        rows.append(["all", *(f"{scores.over_seeds().column(model, name).mean():.4f}" for model in scores.models)])
        lines += ["", *_table([name, *scores.models], rows)]
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def _signed(value: Interval) -> str:
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"
