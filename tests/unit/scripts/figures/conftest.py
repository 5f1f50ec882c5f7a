"""Finished runs to compare, written without training."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from tests.helpers.runs import attached, save_run
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint, projector_meta

SCORES = {"full": 0.9, "free": 0.5, "tuned": 0.8, "random": 0.6}


def _row(name, reducer, seed):
    """A setting in result.json. The tuned setting of a control is the setting `random` of its run."""
    kind, _, budget = name.partition("-")
    num_visual_tokens = int(budget) if budget else reducer.num_tokens(16, has_cls=True, num_dropped=1)
    score = SCORES["random" if isinstance(reducer, Random) else kind]
    return {
        "name": name,
        "num_visual_tokens": 16 if name == "full" else num_visual_tokens,
        "num_questions": 8,
        "metrics": {"all": score + (seed / 100 if kind == "tuned" else 0)},
    }


@pytest.fixture(scope="session")
def finished_run(tiny_folder):
    """A function that writes what a comparison needs of a finished run."""

    def write(
        folder, reducer, *, base=tiny_folder, seed=0, rows=("full", "free", "tuned"), others=(), **changes
    ):
        handle = attached(base, reducer=reducer)
        meta = projector_meta(
            handle.family, reducer, *others, base=str(base), base_fingerprint=fingerprint(handle.family)
        )
        recorded = {name: meta[name] for name in ("budget", "reducer", "other_budgets")}
        save_run(folder, handle, base, **recorded)
        settings = {"data": {"held_out": "q.json"}, "evaluate": {"questions": 8}} | changes
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(settings))
        result = {"rows": [_row(name, reducer, seed) for name in rows], "seed": seed}
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


@pytest.fixture(scope="session")
def seven_runs(tmp_path_factory, finished_run):
    """The run `mine` of 6 tokens among others: another seed, 8 tokens, an ablation, random tokens,
    several budgets.
    """
    folder = tmp_path_factory.mktemp("seven") / "runs"
    mine = VisionZip(budget=6)
    finished_run(folder / "mine", mine, rows=("full", "free", "tuned", "random"))
    finished_run(folder / "again", mine, seed=1)
    finished_run(folder / "more", VisionZip(budget=8))
    finished_run(folder / "without", VisionZip(dominant=0, contextual=6))
    finished_run(folder / "average", VisionZip(budget=6, merge="average"))
    finished_run(folder / "mine-random", Random(budget=6), rows=("tuned",))
    elastic = ("full", "free-4", "free-6", "tuned-4", "tuned-6")
    finished_run(folder / "elastic", VisionZip(budget=4), others=[mine], rows=elastic)
    return folder


@pytest.fixture
def runs(seven_runs, tmp_path):
    """A copy of `seven_runs`, which a test may change."""
    return shutil.copytree(seven_runs, tmp_path / "runs")
