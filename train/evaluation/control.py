"""The control: a run with random tokens instead of VisionZip's, and the same number of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from train.checkpoint import RunFolder
from train.config import build_reducer, family_class, tile_order
from vzip import UserError
from vzip.reducers.visionzip import VisionZip

CONTROL = "random"
"""Name of the control's setting in result.json."""


def control_settings(cfg: DictConfig) -> DictConfig:
    """Make the settings of a run's control, which has a folder of its own and resumes by itself.

    Raises:
        UserError: the run's reducer is not VisionZip.
    """
    reducer = build_reducer(cfg)
    if not isinstance(reducer, VisionZip):
        raise UserError(
            f"control=true compares with reducer=visionzip, not with {cfg.reducer['_target_']}; "
            f"leave control out"
        )

    # Keep the same number of tokens. A budget counts the tokens of several tiles together.
    tokens_per_tile = reducer.dominant + reducer.contextual
    budget_tiles = family_class(cfg).budget_tiles
    count: dict[str, Any] = {"budget": tokens_per_tile * budget_tiles}
    if reducer.keep is not None:
        count = {"keep": reducer.keep}
    random_reducer = {
        "_target_": "vzip.reducers.random.Random",
        **count,
        "anyres": tile_order(cfg),
    }

    # Replace the group instead of merging into it: Random does not have VisionZip's other settings.
    settings = OmegaConf.to_container(cfg, resolve=True)
    settings["reducer"] = random_reducer

    # The run itself has asked the baselines, and a feature cache holds VisionZip's tokens. If the
    # run has no name, the control's name is made from its settings, too.
    changes = {
        "evaluate": {"baselines": False},
        "data": {"cache": False},
        "control": False,
        "name": f"{cfg.name}-random" if cfg.name else None,
    }
    return OmegaConf.merge(OmegaConf.create(settings), changes)


def has_control(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the results of a run include those of its control."""
    return any(row["name"] == CONTROL for row in rows)


def add_control(
    run: RunFolder, rows: Sequence[dict[str, Any]], control_rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Add the results of the control to result.json of the run, as its last setting.

    Args:
        run: the folder of the run.
        rows: the results of the run.
        control_rows: the results of its control.

    Returns:
        all results
    """
    # In its own folder the control is called "tuned".
    all_rows = list(rows)
    for row in control_rows:
        all_rows.append({**row, "name": CONTROL})
    run.replace_rows(all_rows)
    return all_rows
