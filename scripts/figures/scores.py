"""Finished runs beside each other: which of them can be compared, and their scores, row by row."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts.common.held_out import settings_of
from train.config import identity
from vzip import UserError
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import META, RESULT, read_finished, reducers_of

VARIED = ("seed", "reducer", "evaluate", "control")
"""Settings in which runs of one figure differ."""
UNFELT = ("engine", "compile", "memory_gb", "save_every", "deepspeed")
UNFELT_PARTS = ("batch.tokens", "batch.recompute", "batch.micro", "data.cache")
"""Settings that change no gradient, in which they may differ."""


@dataclass(frozen=True)
class Score:
    """One row of a run's result."""

    series: str
    """"full", "free", "tuned", "elastic" (tuned for several budgets at once) or "random" (tuned for random tokens)."""
    reducer: Reducer
    num_visual_tokens: float
    """A question's, on average."""
    metrics: dict[str, float]
    """Share of correct answers by kind of question."""
    num_questions: int
    seed: int | None
    """Of the tuning; None where nothing was tuned."""
    run: str = field(compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for rows that say the same, in whichever run."""
        said = (
            str(value) for value in (self.reducer.settings(), self.num_visual_tokens, self.seed, self.metrics)
        )
        return self.series, self.reducer.name, *said


def score_of(
    row: dict[str, Any], *, series: str, reducer: Reducer, run: str, seed: int | None = None
) -> Score:
    """The score in a row of result.json."""
    return Score(series, reducer, row["num_visual_tokens"], row["metrics"], row["num_questions"], seed, run)


def _read(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(meta.json, result.json) of a finished run. Raises UserError for anything else."""
    meta = read_finished(run)
    settings_of(run)  # which a projector's folder without a run around it lacks, as it lacks results
    return meta, json.loads((run / RESULT).read_text())


@dataclass(frozen=True)
class _Finished:
    """A finished run, as it is compared."""

    measured_on: tuple[Any, ...]
    """What two runs must share for their scores to be comparable: base model, starting projector, questions."""
    recipe: dict[str, Any]
    """How it was tuned: what a figure of budgets, seeds or reducers holds still."""
    scores: list[Score]


def _recipe(cfg: DictConfig) -> dict[str, Any]:
    found = {name: value for name, value in identity(cfg).items() if name not in VARIED + UNFELT}
    groups = {name: value for name, value in found.items() if isinstance(value, dict)}
    return found | {
        name: {part: value for part, value in group.items() if f"{name}.{part}" not in UNFELT_PARTS}
        for name, group in groups.items()
    }


def _finished(run: Path) -> _Finished:
    """Raises UserError for what is no finished run, or can't be read."""
    try:
        meta, result = _read(run)
        cfg = settings_of(run)
        questions = (OmegaConf.select(cfg, name) for name in ("data.held_out", "evaluate.questions"))
        return _Finished(
            measured_on=(meta["base"]["fingerprint"], meta["base"].get("projector"), *questions),
            recipe=_recipe(cfg),
            scores=_finished_scores(run, meta, result),
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run} is no run of this version: {type(error).__name__} {error}") from error


def _finished_scores(run: Path, meta: dict[str, Any], result: dict[str, Any]) -> list[Score]:
    reducers = reducers_of(meta)
    first = next(iter(reducers.values()))
    by_name: dict[str, tuple[str, Reducer]] = {"full": ("full", Identity())}
    for budget, reducer in reducers.items():
        suffix, tuned = (f"-{budget}", "elastic") if len(reducers) > 1 else ("", "tuned")
        by_name |= {f"free{suffix}": ("free", reducer), f"tuned{suffix}": (tuned, reducer)}
    if isinstance(first, Random):
        by_name["tuned"] = ("random", first)
    elif isinstance(first, VisionZip):
        by_name["random"] = ("random", Random(budget=first.dominant + first.contextual))
    found = []
    for row in result["rows"]:
        series, reducer = by_name[row["name"]]
        seed = result["seed"] if series in ("tuned", "elastic", "random") else None
        found.append(score_of(row, series=series, reducer=reducer, seed=seed, run=str(run)))
    return found


def comparable_scores(run: Path, others: Sequence[Path] = ()) -> list[Score]:
    """The scores of a run, of those that stand beside it, and of `others`, each once.

    Of the runs beside it those count that are finished, were measured on the same base model, starting projector and questions,
    and tuned in the same way (one that can't be read is said); of `others` all do that were measured on the same.

    Raises:
        UserError: `run` or one of `others` is no finished run that can be read; one of `others` was measured on something else.
    """
    mine = _finished(run)
    scores = [*mine.scores]
    for other in others:
        given = _finished(other)
        if given.measured_on != mine.measured_on:
            raise UserError(
                f"--runs {other} can't be compared with {run}: base model, starting projector or questions differ"
            )
        scores += given.scores
    for config in sorted(run.parent.glob("*/config.yaml")):
        beside = config.parent
        if beside in (run, *others) or not ((beside / META).is_file() and (beside / RESULT).is_file()):
            continue
        try:
            found = _finished(beside)
        except UserError as error:
            print(f"{beside} is left out: {error}")
            continue
        if (found.measured_on, found.recipe) == (mine.measured_on, mine.recipe):
            scores += found.scores
    return list({score.key: score for score in reversed(scores)}.values())[::-1]


def same_but_budget(scores: Iterable[Score], reducer: Reducer) -> list[Score]:
    """The scores of all tokens, of random ones, and of this reducer: as it is, and at any budget with the paper's split."""

    def fits(other: Reducer) -> bool:
        if not isinstance(other, VisionZip) or not isinstance(reducer, VisionZip):
            return other.name in ("identity", "random")
        usual = VisionZip(budget=other.dominant + other.contextual)
        return other == reducer or other == replace(
            reducer, dominant=usual.dominant, contextual=usual.contextual
        )

    return [score for score in scores if fits(score.reducer)]


def without_a_part(reducer: VisionZip) -> dict[str, VisionZip]:
    """The same number of tokens of both parts, without dominant ones, and without contextual ones."""
    total = reducer.dominant + reducer.contextual
    return {
        "dominant and contextual": reducer,
        "no dominant": replace(reducer, dominant=0, contextual=total),
        "no contextual": replace(reducer, dominant=total, contextual=0),
    }
