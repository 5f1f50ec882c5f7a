"""The control: an ordinary run with as many random tokens in place of the reducer's."""

from collections.abc import Callable
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from train.config import build_reducer
from vzip import UserError
from vzip.reducers.visionzip import VisionZip


def control_row(cfg: DictConfig, tune: Callable[[DictConfig], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """With `control=true`, the row `random`: its own run, folder and resumption; else nothing."""
    if not cfg.control:
        return []
    reducer = build_reducer(cfg)
    if not isinstance(reducer, VisionZip):
        raise UserError(
            f"control=true compares with reducer=visionzip, not with {cfg.reducer['_target_']}; leave control out"
        )
    budget = (reducer.dominant + reducer.contextual) * get_class(cfg.model["_target_"]).budget_tiles
    changes = {
        "reducer": {"_target_": "vzip.reducers.random.Random", "budget": budget, "anyres": reducer.anyres},
        "evaluate": {"baselines": False},
        "data": {"cache": False},
        "control": False,
        "name": cfg.name and f"{cfg.name}-random",
    }
    other = OmegaConf.create({**OmegaConf.to_container(cfg, resolve=True), "reducer": changes.pop("reducer")})
    return [{**row, "name": "random"} for row in tune(OmegaConf.merge(other, changes))]
