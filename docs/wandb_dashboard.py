"""Lay out the dashboard of dashboard.md in a wandb project: python docs/wandb_dashboard.py <entity>/<project>."""

import sys

SECTIONS = {
    "Is it learning?": ("val/total", "train/reward", "train/constraint"),
    "Is it honest?": ("watch/held", "watch/trained", "watch/drop", "watch/diversity"),
    "Is it healthy?": ("train/grad_norm", "train/lr", "watch/text_drift", "watch/saturation", "perf/samples_per_second"),
}
BARS = ("gain/total", "gain/constraint")


def main(target: str) -> None:
    """Save a view of the project; prints its address."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        sys.exit("this needs wandb's own layout library: pip install wandb-workspaces")
    entity, _, project = target.partition("/")
    sections = [
        workspaces.Section(name=title, is_open=True, panels=[panels.LinePlot(x="trainer/global_step", y=[name]) for name in names])
        for title, names in SECTIONS.items()
    ]
    bars = [panels.BarPlot(metrics=[name]) for name in BARS]
    sections.append(workspaces.Section(name="Was it worth it?", is_open=True, panels=bars))
    view = workspaces.Workspace(entity=entity, project=project, name="tc_lightning", sections=sections)
    view.save()
    print(view.url)


if __name__ == "__main__":
    if len(sys.argv) != 2 or "/" not in sys.argv[1]:
        sys.exit(__doc__)
    main(sys.argv[1])
