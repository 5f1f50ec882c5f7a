"""Compare the runs of a folder without wandb: a picture of curves, and tables in RESULTS.md.

Each finished run gets a block in the marked part of RESULTS.md: what was run, when, on what, and
its scores. The block of a run that is no longer in the folder stays, and everything outside the
marked part is left alone.

python -m scripts.report --runs runs --results RESULTS.md
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

# Draw into files, because a server has no screen.
matplotlib.use("Agg")
from matplotlib import pyplot

from data.paths import ROOT
from train.cli import exit_on_user_error, output
from train.evaluation.tables import score_table
from train.runs import FinishedRun, find_runs
from vzip.errors import UserError
from vzip.files import atomic_write
from vzip.redact import redacted

CURVES = {
    "train/loss": "Loss, mean over label tokens",
    "train/lr": "Learning rate",
    "train/grad_norm": "Norm of the projector's gradient, before clipping",
}
SPEED = {
    "train/tokens_per_s": "Tokens per second",
    "train/step_s": "Seconds per step",
    "train/memory_gb": "Peak memory, GB",
}

BEGIN = "<!-- runs: written by `make report` -->"
END = "<!-- end of runs -->"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart."""
STYLES = ("-", "--", ":", "-.")


def read_runs(folder: Path) -> list[FinishedRun]:
    """Read the runs in a folder, by name, and print which folders can't be read, and why.

    Raises:
        UserError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"--runs={folder} is no folder; give the one that runs were written to, e.g. runs")

    # A folder that can't be read must not hide the others.
    runs = []
    num_left_out = 0
    for run in find_runs(folder):
        try:
            _read_all(run)
            runs.append(run)
        except (ValueError, LookupError, TypeError) as error:  # a UserError is a ValueError
            num_left_out += 1
            print(f"{run.path} was left out: {type(error).__name__} {error}")

    if num_left_out:
        print(f"{num_left_out} of {num_left_out + len(runs)} folders were left out")
    if not runs:
        raise UserError(f"--runs={folder} holds no run of this version; `make tune` makes one")
    return runs


def _read_all(run: FinishedRun) -> None:
    """Read everything that a report needs. Raises if anything is missing."""
    if run.is_finished:
        block(run)
    else:
        # Each of these reads a file. A run that is still training has no results.
        _ = run.config, run.env, run.metrics


def block(run: FinishedRun) -> str:
    """Write the part of RESULTS.md about a finished run."""
    text = f"{_what_was_run(run)} {_where_it_ran(run)}"
    if run.scores:
        text += f"\n\n{score_table(run.scores).markdown()}"

    # The next report finds the blocks by these marks, so no text of a run may hold one.
    if any(mark in text for mark in ("\n#", BEGIN, END)):
        raise UserError(
            f"{run.path} holds texts that no run writes: a heading, or a mark of the report; move it out of "
            f"{run.path.parent}"
        )
    return f"### {run.name}\n\n{text}"


def _what_was_run(run: FinishedRun) -> str:
    """Say what the command did: model, seed, steps, time, losses, data and questions."""
    # The command without the folder that the program stood in.
    program, *arguments = run.env["command"]
    command = redacted(" ".join([Path(program).name, *arguments]))
    result = run.result
    seconds = sum(line["train/step_s"] for line in run.metrics)

    # A run may have been stopped before its first step, and may ask no questions.
    losses = ""
    if run.metrics:
        first, last = run.metrics[0]["train/loss"], run.metrics[-1]["train/loss"]
        losses = f", loss {first:.3f} to {last:.3f}"
    questions = "No questions were asked."
    if run.scores:
        questions = f"{run.scores[0]['num_questions']:,} questions."

    return (
        f"`train/{command}`: {run.config['model']['name']}, seed {result['seed']}, "
        f"{result['num_steps']} steps of {run.config['batch']['size']} examples in {seconds:,.0f} s"
        f"{losses}; data {result['manifest'][:12]}. {questions}"
    )


def _where_it_ran(run: FinishedRun) -> str:
    """Say when and where it ran: date, commit, hardware, version of torch."""
    env = run.env
    hardware = env["hardware"]
    changed = " and changed files" if env["modified_files"] else ""

    # A source archive, and a machine without git, know no commit.
    commit = (env["commit"] or "unknown")[:7]
    return (
        f"{env['date']}, commit {commit}{changed}, {hardware['world_size']} rank(s) on "
        f"{hardware['device']}, {hardware['num_cpus']} cores, torch {env['packages']['torch']}."
    )


def update(text: str, blocks: Mapping[str, str]) -> str:
    """Put the blocks of runs into the text of RESULTS.md, in place of their old blocks.

    All blocks are sorted by name.

    Raises:
        UserError: the marked part has no end.
    """
    # The text before and behind the marked part stays unchanged. The first report adds the part.
    before, begin, rest = text.partition(BEGIN)
    if not begin:
        before = f"{text.rstrip()}\n\n## Runs\n\n"
        rest = f"\n{END}\n"
    inside, end, after = rest.partition(END)
    if not end:
        raise UserError(
            f"the results file has {BEGIN!r}, but not {END!r} behind it; put that line where the runs end"
        )

    # Take the blocks of the last report, each from its heading on. The new ones replace them.
    merged = {}
    for part in re.split(r"^### ", inside, flags=re.MULTILINE)[1:]:
        name = part.split("\n", 1)[0]
        merged[name] = f"### {part.strip()}"
    merged |= blocks

    in_order = [merged[name] for name in sorted(merged)]
    return "\n\n".join([before + BEGIN, *in_order, END + after])


def draw_curves(runs: Sequence[FinishedRun], target: Path) -> None:
    """Draw all metrics over the steps, one line per run."""
    # Colours repeat after eight runs, and then the style of the line changes.
    metrics = CURVES | SPEED
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, metrics.items(), strict=True):
        for index, run in enumerate(runs):
            lines = [line for line in run.metrics if name in line]
            axis.plot(
                [line["step"] for line in lines],
                [line[name] for line in lines],
                color=COLOURS[index % len(COLOURS)],
                linestyle=STYLES[index // len(COLOURS) % len(STYLES)],
                # Between two dollars matplotlib would read a formula.
                label=run.name.replace("$", r"\$"),
            )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)

    # All pictures have the same lines, so one legend is enough.
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    with output("--curves", target), atomic_write(target) as scratch:
        figure.savefig(scratch, format="png", dpi=120)
    pyplot.close(figure)


def _read_results(path: Path) -> str:
    """Read the results file, or start a new one. Raises UserError if it can't be read."""
    if not path.exists():
        return "# Results\n"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--results={path} can't be read: {error}; give a text file in UTF-8") from error


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of run folders")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "RESULTS.md",
        help="Markdown file; its marked part is rewritten",
    )
    parser.add_argument(
        "--curves", type=Path, help="picture of the curves, by default report.png in the folder of runs"
    )
    arguments = parser.parse_args()
    runs = read_runs(arguments.runs)

    # Only finished runs have scores to write. The curves below also show runs that train.
    blocks = {run.name: block(run) for run in runs if run.is_finished}
    results = arguments.results
    text = update(_read_results(results), blocks)
    with output("--results", results), atomic_write(results) as scratch:
        scratch.write_text(text, encoding="utf-8")

    curves = arguments.curves or arguments.runs / "report.png"
    started = [run for run in runs if run.metrics]
    draw_curves(started, curves)
    print(f"{results}: {len(blocks)} finished runs\n{curves}: {len(started)} runs")


if __name__ == "__main__":
    main()
