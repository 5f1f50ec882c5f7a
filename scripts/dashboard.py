"""Make the team's wandb workspace, and a report that compares its runs.

python -m scripts.dashboard --entity MYTEAM      make both, in the project that runs are tracked in
python -m scripts.dashboard --dry-run            write both to dashboard.json, without a network
"""

import argparse
import json
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb.errors import Error

from scripts.report import CURVES, SPEED
from train.cli import exit_on_user_error, output
from vzip import UserError
from vzip.files import write_json

SETTINGS = ("full", "free", "tuned", "random")
"""The settings of a run, by their names in its results."""

BUDGETS = (4, 8, 16, 64, 128, 160, 192, 320, 640)
"""Budgets that a run with several may have: from `+exp=elastic`, and from the paper."""
TITLE = "Full, training-free and tuned"


def line_plots(metrics: dict[str, str]) -> list[Any]:
    """Make a panel per metric, with its curve over the steps."""
    return [wr.LinePlot(title=title, x="Step", y=[name]) for name, title in metrics.items()]


def result_panels() -> list[Any]:
    """Make the panels of scores, answers, and pictures of kept tokens."""
    # A run with one budget has "tuned", and a run with several has "tuned-BUDGET".
    tuned = wr.SummaryMetric("eval/tuned_all")
    by_budget = []
    for setting in ("free", "tuned"):
        by_budget += [f"eval/{setting}-{budget}_all" for budget in BUDGETS]

    # What may explain a score: learning rate and budget.
    columns = []
    for metric in (wr.Config("optim.lr"), wr.Config("reducer.budget"), tuned):
        columns.append(wr.ParallelCoordinatesPlotColumn(metric=metric))

    return [
        wr.BarPlot(
            title="Correct answers, share of all",
            metrics=[f"eval/{setting}_all" for setting in SETTINGS],
        ),
        wr.BarPlot(title="Correct answers of runs for several budgets, share of all", metrics=by_budget),
        wr.ScatterPlot(title="Tuned, over the budget", x=wr.Config("reducer.budget"), y=tuned),
        wr.ParallelCoordinatesPlot(title="Learning rate, budget, score", columns=columns),
        wr.WeavePanelSummaryTable(table_name="eval/scores"),
        wr.WeavePanelSummaryTable(table_name="eval/answers"),
        wr.MediaBrowser(
            title="Kept tokens: dominant orange, contextual blue", media_keys=["eval/kept_tokens"]
        ),
    ]


def make_workspace(entity: str, project: str) -> ws.Workspace:
    """Make the view of all runs: results first, then curves."""
    sections = {
        "Results": result_panels(),
        "Training": line_plots(CURVES),
        "Speed and memory": line_plots(SPEED),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="vzip",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
    )


def _grid(panels: list[Any]) -> wr.PanelGrid:
    """Show panels of all runs in the report's own project."""
    return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=panels)


def make_report(entity: str, project: str) -> wr.Report:
    """Make a page that compares the project's runs."""
    return wr.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description=(
            "Settings: full, all visual tokens; free, reduced without training; "
            "tuned, reduced with a tuned projector."
        ),
        blocks=[
            wr.TableOfContents(),
            wr.H1("Results"),
            _grid(result_panels()),
            wr.H1("Curves"),
            _grid(line_plots(CURVES) + line_plots(SPEED)),
            wr.H1("Differences between the runs"),
            _grid([wr.RunComparer(diff_only=True)]),
        ],
    )


def specification(workspace: ws.Workspace, report: wr.Report) -> dict[str, Any]:
    """Return the content of both as JSON. The package has no public way to get it."""
    # `_to_model` is private, but this is the content that `save` would send.
    models = {"workspace": workspace._to_model(), "report": report._to_model()}
    content = {}
    for name, model in models.items():
        content[name] = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    return content


def default_entity() -> str:
    """Return the account's default team. Raises UserError without a key or a network."""
    try:
        return str(wandb.Api().default_entity)
    except (Error, OSError) as error:
        raise UserError(
            f"wandb can't be asked: {error}\nRun `wandb login`, or use --dry-run, which needs no network"
        ) from error


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", help="wandb team or user; by default your own")
    parser.add_argument("--project", default="vzip", help="track.project of the runs")
    parser.add_argument("--dry-run", action="store_true", help="write the specification, and send nothing")
    parser.add_argument("--out", type=Path, default=Path("dashboard.json"), help="file of --dry-run")
    arguments = parser.parse_args()

    # A dry run needs no account, so it writes a placeholder.
    entity = arguments.entity
    if entity is None:
        entity = "ENTITY" if arguments.dry_run else default_entity()
    workspace = make_workspace(entity, arguments.project)
    report = make_report(entity, arguments.project)

    if arguments.dry_run:
        with output("--out", arguments.out):
            write_json(arguments.out, specification(workspace, report))
        print(
            f"{arguments.out}: a workspace of {len(workspace.sections)} sections, "
            f"a report of {len(report.blocks)} blocks"
        )
        return

    # Print each address as soon as the page is there, because the second page may fail.
    try:
        for page in (workspace, report):
            page.save()
            print(page.url)
    except (Error, OSError) as error:
        raise UserError(
            f"wandb did not take it: {error}\nCheck --entity={entity} and --project={arguments.project}"
        ) from error


if __name__ == "__main__":
    main()
