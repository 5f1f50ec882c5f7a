"""Several budgets for one projector: `reducer.budget=[64, 128, 192]` draws one of them for each packed micro batch."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from vzip import UserError


def budgets_of(cfg: DictConfig) -> list[Any]:
    """The run's budgets, in their order; of a reducer that has a single one or none, just that (perhaps None).

    Raises UserError for a list of anything but different whole numbers, or of none.
    """
    given = cfg.reducer.get("budget")
    if not OmegaConf.is_list(given):
        return [given]
    if (
        not given
        or any(type(budget) is not int or budget < 1 for budget in given)
        or len(set(given)) < len(given)
    ):
        raise UserError(
            f"reducer.budget={given} must be a whole number, or a list of different ones, each at least 1, e.g. [64, 128, 192]"
        )
    return list(given)


def check_budgets(cfg: DictConfig) -> None:
    """Raises UserError for a list of budgets that is none, or beside settings that only one budget can have."""
    if not OmegaConf.is_list(cfg.reducer.get("budget")):
        return
    budgets = budgets_of(cfg)
    refused = {
        "engine=reference": (
            cfg.engine == "reference",
            "a budget is drawn for each packed micro batch: set engine=fast",
        ),
        "data.cache=true": (cfg.data.cache, "a cache is of one reducer: set data.cache=false"),
        "control=true": (cfg.control, "a control is of one budget: leave control out"),
    }
    for name in ("dominant", "contextual"):
        value = cfg.reducer.get(name)
        refused[f"reducer.{name}={value}"] = (
            value is not None,
            "each budget is split at the paper's ratio: leave it out",
        )
    for setting, (there, reason) in refused.items():
        if there:
            raise UserError(
                f"reducer.budget={budgets} does not go with {setting}, as {reason}; or give a single budget"
            )
