"""Build the team's wandb workspace, and a report that compares its runs.

python -m scripts.dashboard --entity MYTEAM              make both, in the project that runs are tracked in
python -m scripts.dashboard --dry-run                    write what would be made to dashboard.json, without a network
"""

import argparse
import json
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb.errors import Error

from data.paths import write_json
from scripts.report import CURVES, SPEED
from train.cli import exit_on_user_error, output
from vzip import UserError

ROWS = ("full", "free", "tuned", "random")
BUDGETS = (4, 8, 16, 64, 128, 160, 192, 320, 640)
"""Of runs for several budgets, each a row of its own: those of `+exp=elastic`, and the paper's."""
TITLE = "Full, free and tuned"


def lines(metrics: dict[str, str]) -> list[Any]:
    """A curve over the steps for each metric."""
    return [wr.LinePlot(title=title, x="Step", y=[name]) for name, title in metrics.items()]


def results() -> list[Any]:
    """Panels of the scores, of answers and of the pictures of kept tokens."""
    tuned = wr.SummaryMetric("eval/tuned_all")
    return [
        wr.BarPlot(title="Correct answers, share of all", metrics=[f"eval/{row}_all" for row in ROWS]),
        wr.BarPlot(
            title="Correct answers of runs for several budgets, share of all",
            metrics=[f"eval/{row}-{budget}_all" for row in ("free", "tuned") for budget in BUDGETS],
        ),
        wr.ScatterPlot(title="Tuned, over the budget", x=wr.Config("reducer.budget"), y=tuned),
        wr.ParallelCoordinatesPlot(
            title="Learning rate, budget, score",
            columns=[
                wr.ParallelCoordinatesPlotColumn(metric=metric)
                for metric in (wr.Config("optim.lr"), wr.Config("reducer.budget"), tuned)
            ],
        ),
        wr.WeavePanelSummaryTable(table_name="eval/scores"),
        wr.WeavePanelSummaryTable(table_name="eval/answers"),
        wr.MediaBrowser(
            title="Kept tokens: dominant orange, contextual blue", media_keys=["eval/kept_tokens"]
        ),
    ]


def make_workspace(entity: str, project: str) -> ws.Workspace:
    """The view of all runs: results first, then curves."""
    sections = {"Results": results(), "Training": lines(CURVES), "Speed and memory": lines(SPEED)}
    return ws.Workspace(
        entity=entity,
        project=project,
        name="vzip",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
    )


def make_report(entity: str, project: str) -> wr.Report:
    """A page that compares the project's runs."""

    def grid(panels: list[Any]) -> wr.PanelGrid:
        return wr.PanelGrid(runsets=[wr.Runset(name="runs")], panels=panels)  # of the report's own project

    return wr.Report(
        entity=entity,
        project=project,
        title=TITLE,
        description="Rows: full, all visual tokens; free, reduced without training; tuned, reduced with a tuned projector.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Results"),
            grid(results()),
            wr.H1("Curves"),
            grid(lines(CURVES) + lines(SPEED)),
            wr.H1("What differs between the runs"),
            grid([wr.RunComparer(diff_only=True)]),
        ],
    )


def specification(workspace: ws.Workspace, report: wr.Report) -> dict[str, Any]:
    """What would be sent, as JSON; the package has no public way to it."""
    made = {"workspace": workspace._to_model(), "report": report._to_model()}
    return {
        name: json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
        for name, model in made.items()
    }


def own_entity() -> str:
    """The account's default team. Raises UserError without a key or a network."""
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
    parser.add_argument("--out", type=Path, default=Path("dashboard.json"), help="where --dry-run writes")
    arguments = parser.parse_args()
    entity = arguments.entity or ("ENTITY" if arguments.dry_run else own_entity())
    workspace, report = make_workspace(entity, arguments.project), make_report(entity, arguments.project)
    if arguments.dry_run:
        with output("--out", arguments.out):
            write_json(arguments.out, specification(workspace, report))
        print(
            f"{arguments.out}: a workspace of {len(workspace.sections)} sections, a report of {len(report.blocks)} blocks"
        )
        return
    try:
        for made in (workspace, report):
            made.save()
            print(made.url)
    except (Error, OSError) as error:
        raise UserError(
            f"wandb did not take it: {error}\nCheck --entity={entity} and --project={arguments.project}"
        ) from error


if __name__ == "__main__":
    main()
