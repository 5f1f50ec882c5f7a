"""Compare the runs of a folder without wandb: their curves as a picture, and their part of RESULTS.md.

Of a finished run RESULTS.md gets a block: what was run, when, on what, and its rows. A block of a run that is no longer in the
folder stays as it is; everything outside the marked part of RESULTS.md is left alone.

python -m scripts.report --runs runs --results RESULTS.md
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot

from data.paths import ROOT, atomic_write
from train.cli import exit_on_user_error, output
from vzip import UserError

CURVES = {
    "train/loss": "Loss, mean over label tokens",
    "train/lr": "Learning rate",
    "train/grad_norm": "Norm of the projector's gradient, before clipping",
}
SPEED = {
    "train/tokens_per_s": "Tokens a second",
    "train/step_s": "Seconds a step",
    "train/memory_gb": "Peak memory, GB",
}

BEGIN, END = "<!-- runs: written by `make report` -->", "<!-- end of runs -->"
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
    "#F0E442",
)  # Okabe and Ito's
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Run:
    """What a run's folder says."""

    name: str
    config: dict[str, Any]
    env: dict[str, Any]
    metrics: list[dict[str, float]]
    result: dict[str, Any] | None
    """None of a run that has not finished."""


def read_run(folder: Path) -> Run:
    """Raises OSError, ValueError, KeyError, TypeError or YAMLError for a folder that is no run of this version."""
    result, whole = (
        folder / "result.json",
        [line for line in (folder / "metrics.jsonl").open() if line.endswith("\n")],
    )
    run = Run(
        name=folder.name,
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        env=json.loads((folder / "env.json").read_text()),
        metrics=[json.loads(line) for line in whole],
        result=json.loads(result.read_text()) if result.is_file() else None,
    )
    if run.result is not None:
        block(run)  # that all it speaks of is there
    return run


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder, by name; what can't be read is said. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"--runs={folder} is no folder; give the one that runs were written to, e.g. runs")
    runs, unread = [], []
    for path in sorted(path.parent for path in folder.glob("*/config.yaml")):
        try:
            runs.append(read_run(path))
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            unread.append(path)
            print(f"{path} was left out: {type(error).__name__} {error}")
    if unread:
        print(f"{len(unread)} of {len(unread) + len(runs)} folders were left out")
    if not runs:
        raise UserError(f"--runs={folder} holds no run of this version; `make tune` makes one")
    return runs


def _number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table of a run's rows."""
    kinds = list(rows[0]["metrics"])
    full = next((row["metrics"] for row in rows if row["name"] == "full"), {})
    lines = [f"| row | visual tokens | {' | '.join(kinds)} |", f"|---|--:|{'--:|' * len(kinds)}"]
    for row in rows:
        cells = []
        for kind in kinds:
            value = row["metrics"][kind]
            share = f" ({value / full[kind]:.0%})" if full.get(kind) and row["name"] != "full" else ""
            cells.append(_number(value) + share)
        lines.append(f"| {row['name']} | {row['num_visual_tokens']:,} | {' | '.join(cells)} |")
    return lines


def block(run: Run) -> str:
    """A finished run's part of RESULTS.md."""
    assert run.result is not None
    env, config, rows = run.env, run.config, run.result["rows"]
    command = " ".join([Path(env["command"][0]).name, *env["command"][1:]])
    seconds = sum(line["train/step_s"] for line in run.metrics)
    changed = " and changed files" if env["modified_files"] else ""
    questions = f" {rows[0]['num_questions']:,} questions." if rows else " No questions were asked."
    losses = (
        f", loss {run.metrics[0]['train/loss']:.3f} to {run.metrics[-1]['train/loss']:.3f}"
        if run.metrics
        else ""
    )
    lines = [
        f"### {run.name}",
        "",
        f"`train/{command}`: {config['model']['name']}, seed {run.result['seed']}, {run.result['num_steps']} steps of "
        f"{config['batch']['size']} rows in {seconds:,.0f} s{losses}; data {run.result['manifest'][:12]}.{questions} "
        f"{env['date']}, commit {env['commit'][:7]}{changed}, {env['hardware']['world_size']} rank(s) on "
        f"{env['hardware']['device']}, {env['hardware']['num_cpus']} cores, torch {env['packages']['torch']}.",
    ]
    return "\n".join([*lines, *(["", *scores(rows)] if rows else [])])


def update(text: str, blocks: Mapping[str, str]) -> str:
    """RESULTS.md with the blocks of these runs put in, or in place of their old ones, sorted by name.

    Raises:
        UserError: a marked part that has no end.
    """
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        before, rest = f"{text.rstrip()}\n\n## Runs\n\n", f"\n{END}\n"
    inside, end, after = rest.partition(END)
    if not end:
        raise UserError(
            f"the results file has {BEGIN!r}, but not {END!r} behind it; put that line where the runs end"
        )
    old = {
        part.split("\n", 1)[0]: f"### {part.strip()}"
        for part in re.split(r"^### ", inside, flags=re.MULTILINE)[1:]
    }
    merged = dict(sorted((old | dict(blocks)).items()))
    return "\n\n".join([before + BEGIN, *merged.values(), END + after])


def draw_curves(runs: Sequence[Run], target: Path) -> None:
    """A picture of all metrics over the steps, one line a run."""
    metrics = CURVES | SPEED
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, metrics.items(), strict=True):
        for index, run in enumerate(runs):
            points = [(line["step"], line[name]) for line in run.metrics if name in line]
            style = STYLES[index // len(COLOURS) % len(STYLES)]
            axis.plot(
                *zip(*points, strict=True),
                color=COLOURS[index % len(COLOURS)],
                linestyle=style,
                label=run.name,
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    with output("--curves", target), atomic_write(target) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    pyplot.close(figure)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of run folders")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "RESULTS.md", help="file whose marked part is written anew"
    )
    parser.add_argument(
        "--curves", type=Path, help="the picture, by default report.png in the folder of runs"
    )
    arguments = parser.parse_args()
    runs = read_runs(arguments.runs)
    blocks = {run.name: block(run) for run in runs if run.result is not None}
    text = arguments.results.read_text() if arguments.results.is_file() else "# Results\n"
    text = update(text, blocks)
    with output("--results", arguments.results), atomic_write(arguments.results) as scratch:
        scratch.write_text(text)
    curves = arguments.curves or arguments.runs / "report.png"
    started = [run for run in runs if run.metrics]
    draw_curves(started, curves)
    print(f"{arguments.results}: {len(blocks)} finished runs\n{curves}: {len(started)} runs")


if __name__ == "__main__":
    main()
