"""Collect the scores of finished runs that can be compared, one score for each setting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train.config import identity
from train.runs import FinishedRun, find_runs
from vzip import UserError
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.meta import META, anyres_of, reducers_of

VARIED = ("seed", "reducer", "evaluate", "control")
"""Settings in which the runs of one figure may differ, because the figure shows them."""
WITHOUT_EFFECT = (
    "engine",
    "compile",
    "memory_gb",
    "save_every",
    "deepspeed",
    "batch.tokens",
    "batch.recompute",
    "batch.micro",
    "data.cache",
)
"""Settings in which they may differ, because they change no gradient."""


@dataclass(frozen=True)
class Score:
    """The scores of one setting of a run."""

    series: str
    """"full", "free" (training-free), "tuned", "elastic" (for several budgets) or "random"."""
    reducer: Reducer
    num_visual_tokens: float
    """Visual tokens of a question, on average."""
    metrics: dict[str, float]
    """Share of correct answers by kind of question."""
    num_questions: int
    seed: int | None
    """Seed of the tuning; None if nothing was tuned."""
    run: str = field(compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two scores that say the same, also if they are from different runs."""
        values = (self.reducer.settings(), self.num_visual_tokens, self.seed, self.metrics)
        return self.series, self.reducer.name, *map(str, values)


def score_of(
    row: dict[str, Any], *, series: str, reducer: Reducer, run: str, seed: int | None = None
) -> Score:
    """Make the score of a setting in result.json."""
    return Score(
        series=series,
        reducer=reducer,
        num_visual_tokens=row["num_visual_tokens"],
        metrics=row["metrics"],
        num_questions=row["num_questions"],
        seed=seed,
        run=run,
    )


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison needs to know about a finished run."""

    measured_on: tuple[Any, ...]
    """Base model, starting projector, order of tiles, questions and their kinds.

    Equal if scores are comparable.
    """
    recipe: dict[str, Any]
    """How the run was tuned. All runs that a figure takes by itself have the same recipe."""
    scores: list[Score]


def _recipe(run: FinishedRun) -> dict[str, Any]:
    """Return the settings that must be equal in two runs of a figure, by their full names."""
    recipe = {}
    for name, value in identity(run.settings).items():
        if name in VARIED:
            continue

        # Give the settings of a group their full names, such as "batch.micro".
        group = value if isinstance(value, dict) else {}
        recipe |= {f"{name}.{key}": group[key] for key in group}
        if not group:
            recipe[name] = value

    # "deepspeed" leaves out the whole group, "batch.micro" a single setting.
    for name in list(recipe):
        if name in WITHOUT_EFFECT or name.partition(".")[0] in WITHOUT_EFFECT:
            del recipe[name]
    return recipe


def _series_by_name(reducers: dict[int | None, Reducer]) -> dict[str, tuple[str, Reducer]]:
    """Return the series and the reducer of each setting that result.json can have, by name."""
    # A run that was tuned for several budgets names each of them in its settings.
    series: dict[str, tuple[str, Reducer]] = {"full": ("full", Identity())}
    if len(reducers) > 1:
        for budget, reducer in reducers.items():
            series[f"free-{budget}"] = ("free", reducer)
            series[f"tuned-{budget}"] = ("elastic", reducer)
        return series

    (reducer,) = reducers.values()
    series["free"] = ("free", reducer)
    series["tuned"] = ("tuned", reducer)

    # Random tokens are the control. It is a run of its own, or it is part of a run with VisionZip.
    if isinstance(reducer, Random):
        series["tuned"] = ("random", reducer)
    elif isinstance(reducer, VisionZip):
        series["random"] = ("random", Random(budget=reducer.dominant + reducer.contextual))
    return series


def _scores(run: FinishedRun) -> list[Score]:
    by_name = _series_by_name(reducers_of(run.meta))
    scores = []
    for row in run.scores:
        # Full and training-free are the same for every seed, so they count once in a figure.
        series, reducer = by_name[row["name"]]
        seed = run.result["seed"] if series in ("tuned", "elastic", "random") else None
        scores.append(score_of(row, series=series, reducer=reducer, seed=seed, run=str(run.path)))
    return scores


def read_compared(run: FinishedRun) -> ComparedRun:
    """Read a finished run. Raises UserError if it is not finished, or can't be read."""
    try:
        base = run.meta["base"]

        # A folder with only a projector lacks both files, and reading them says so.
        _ = run.config, run.result
        scores = _scores(run)
        return ComparedRun(
            measured_on=(
                base["fingerprint"],
                base.get("projector"),
                anyres_of(run.meta),
                run.setting("data.held_out"),
                run.setting("evaluate.questions"),
                sorted(scores[0].metrics) if scores else [],
            ),
            recipe=_recipe(run),
            scores=scores,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run.path} is no run of this version: {type(error).__name__} {error}") from error


def comparable_scores(path: Path, others: Sequence[Path] = ()) -> list[Score]:
    """Collect the scores of a run, of the runs beside it, and of `others`, each once.

    A run beside it counts if it is finished, was measured on the same base model, starting
    projector and questions, and was tuned in the same way. A run in `others` may be tuned in
    another way.

    Raises:
        UserError: the run or one of `others` is not a finished run, or one of `others` was measured
            on something else.
    """
    # Runs that the user named must be comparable, or the figure would be wrong.
    run = read_compared(FinishedRun(path))
    scores = list(run.scores)
    for other_path in others:
        other = read_compared(FinishedRun(other_path))
        if other.measured_on != run.measured_on:
            raise UserError(
                f"--runs {other_path} can't be compared with {path}: base model, starting projector, "
                f"order of tiles or questions differ"
            )
        scores += other.scores

    # Runs that lie beside it were not named, so those that do not fit are left out.
    for beside in find_runs(path.parent):
        has_finished = beside.is_finished and (beside.path / META).is_file()
        if beside.path in (path, *others) or not has_finished:
            continue
        try:
            neighbour = read_compared(beside)
        except UserError as error:
            print(f"{beside.path} is left out: {error}")
            continue
        if (neighbour.measured_on, neighbour.recipe) == (run.measured_on, run.recipe):
            scores += neighbour.scores

    # Two runs may have the same score of full, or of training-free: keep the first.
    unique: dict[tuple[Any, ...], Score] = {}
    for score in scores:
        unique.setdefault(score.key, score)
    return list(unique.values())


def same_but_budget(scores: Iterable[Score], reducer: Reducer) -> list[Score]:
    """Select the scores with all tokens, with random ones, and with this reducer at any budget.

    At another budget the reducer must split its tokens at the paper's ratio.
    """

    def fits(other: Reducer) -> bool:
        if not isinstance(other, VisionZip) or not isinstance(reducer, VisionZip):
            return other.name in ("identity", "random")
        usual = VisionZip(budget=other.dominant + other.contextual)
        with_usual_split = replace(reducer, dominant=usual.dominant, contextual=usual.contextual)
        return other in (reducer, with_usual_split)

    return [score for score in scores if fits(score.reducer)]


def without_a_part(reducer: VisionZip) -> dict[str, VisionZip]:
    """Return reducers with the same number of tokens: of both kinds, of one kind, of the other."""
    total = reducer.dominant + reducer.contextual
    return {
        "dominant and contextual": reducer,
        "no dominant": replace(reducer, dominant=0, contextual=total),
        "no contextual": replace(reducer, dominant=total, contextual=0),
    }
