"""Lay out the dashboard of dashboard.md in a wandb project: python docs/wandb_dashboard.py <entity>/<project>."""

import sys
from typing import Any

SECTIONS = {
    "Is it learning?": ("train/reward", "train/constraint"),
    "Is it honest?": ("watch/held", "watch/trained", "watch/drop", "watch/diversity"),
    "Is it healthy?": ("train/grad_norm", "train/lr", "watch/text_drift", "watch/saturation", "perf/samples_per_second"),
}
FAMILIES = {"Is it learning?": ("val",), "Is it honest?": ("watch",)}  # every name of a family in one plot
BARS = ("gain/total", "gain/constraint")
STEP = "trainer/global_step"


def layout(entity: str, project: str) -> Any:
    """The workspace, built without a network; `save()` sends it."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        sys.exit("this needs wandb's own layout library: pip install wandb-workspaces")
    sections = []
    for title, names in SECTIONS.items():
        plots = [panels.LinePlot(title=f"{name}/*", x=STEP, metric_regex=f"^{name}/.*") for name in FAMILIES.get(title, ())]
        plots += [panels.LinePlot(title=name, x=STEP, y=[name]) for name in names]
        if title == "Is it honest?":
            plots.append(panels.MediaBrowser(title="samples", media_keys=["samples"], mode="gallery", gallery_axis="step"))
        sections.append(workspaces.Section(name=title, is_open=True, panels=plots))
    last = [panels.BarPlot(title=name, metrics=[panels.SummaryMetric(name)]) for name in BARS]
    last.append(panels.WeavePanelSummaryTable(table_name="table/before_after"))
    sections.append(workspaces.Section(name="Was it worth it?", is_open=True, panels=last))
    return workspaces.Workspace(entity=entity, project=project, name="tc_lightning", sections=sections)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].count("/") != 1 or not all(sys.argv[1].split("/")):
        sys.exit(__doc__)
    view = layout(*sys.argv[1].split("/"))
    from wandb.errors import Error

    try:
        view.save()
    except Error as error:  # no key, no such project
        sys.exit(f"{sys.argv[1]}: {error}")
    print(view.url)
