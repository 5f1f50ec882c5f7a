"""Check the settings of a run before any work starts.

The types and limits of single settings stand in train/settings.py. Here are the checks of names,
which Hydra leaves out for settings that are added with a plus, and the rules about settings that do
not go together.
"""

import difflib
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from train.config import budgets_of
from train.settings import Config, GradientEngine, LoraSettings, ReducerSettings, check_not_renamed
from vzip import UserError
from vzip.errors import check_choice

OPEN_GROUPS = {"reducer": ReducerSettings}
"""Groups whose members have settings of their own, with the settings that are common to them."""
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(cfg: DictConfig) -> None:
    """Check all settings. Raises UserError for the first one that is wrong."""
    _check_group("", cfg, Config)
    for group, schema in OPEN_GROUPS.items():
        _check_group(f"{group}.", cfg[group], schema, is_open=True)
    _check_tune(cfg)
    _check_deepspeed(cfg)
    _check_budgets(cfg)


def setting_names(schema: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all settings, such as "optim.lr". An open group counts as one setting."""
    for field in fields(schema):
        if is_dataclass(field.type):
            yield from setting_names(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _unknown(name: str) -> UserError:
    """Make the error about a name that is no setting, with the most similar name."""
    names = list(setting_names())
    by_last_part = {known.rsplit(".", 1)[-1]: known for known in names}
    similar = difflib.get_close_matches(name, names, 1)
    if not similar:  # the group may be missing, as in "lr"
        last_parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, 1)
        similar = [by_last_part[part] for part in last_parts]
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return UserError(f"{name} is no setting{hint}")


def _check_group(prefix: str, group: DictConfig, schema: Any, *, is_open: bool = False) -> None:
    """Check the names and values of a group, and of the groups in it.

    Args:
        prefix: what stands in front of a setting's name, such as "optim.".
        group: the settings.
        schema: the dataclass that lists them.
        is_open: whether settings that are not listed are allowed.
    """
    known = {field.name: field for field in fields(schema)}
    for key in group:
        name = f"{prefix}{key}"
        check_not_renamed(name)
        if key not in known and not is_open:
            raise _unknown(name)

    for key, field in known.items():
        if key not in group:
            continue
        if is_dataclass(field.type):
            _check_group(f"{prefix}{key}.", group[key], field.type)
        else:
            _check_value(f"{prefix}{key}", group[key], field)


def _check_value(name: str, value: Any, field: Field[Any]) -> None:
    """Check the type and the limits of one setting."""
    kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
    if value is None:
        return  # the schema refuses null where it is not allowed
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Enum):
            check_choice(name, str(value), [member.value for member in kind])
        elif kind in TYPES and not _is_a(value, kind):
            raise UserError(f"{name}={value} must be {TYPES[kind]}")
        break  # the second kind of a union is null

    check = field.metadata.get("check")
    if check is not None:
        check(name, value)


def _is_a(value: Any, kind: type) -> bool:
    """Tell whether a value has a type. A whole number is a number too, but true is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _check_tune(cfg: DictConfig) -> None:
    """Check that something is tuned, and the settings of LoRA."""
    lora = cfg.tune.lora
    if lora is None:
        if not cfg.tune.projector:
            raise UserError(
                "tune.projector=false and tune.lora=null tune nothing; "
                "use tune=projector or tune=projector_lora"
            )
        return
    if not OmegaConf.is_dict(lora):
        raise UserError(
            f"tune.lora={lora} must be null or a mapping; use tune=projector_lora or tune=language_lora"
        )
    _check_group("tune.lora.", lora, LoraSettings)


def _check_deepspeed(cfg: DictConfig) -> None:
    """Check the ZeRO stage. DeepSpeed checks its other settings itself."""
    stage = OmegaConf.select(cfg, "deepspeed.zero_optimization.stage")
    check_choice("deepspeed.zero_optimization.stage", stage, (0, 1, 2, 3))
    if cfg.quantize and stage == 3:
        raise UserError(
            f"quantize={cfg.quantize} does not go with ZeRO 3, which can't share quantised weights: "
            f"set deepspeed=zero0"
        )


def _check_budgets(cfg: DictConfig) -> None:
    """Check a list of budgets, and the settings that only go with a single budget."""
    budgets = budgets_of(cfg)
    if not OmegaConf.is_list(cfg.reducer.get("budget")):
        return

    # Each conflicting setting, with the reason why it conflicts.
    conflicts = {}
    if cfg.engine == GradientEngine.reference:
        conflicts["engine=reference"] = "a budget is drawn for each packed micro batch: set engine=fast"
    if cfg.data.cache:
        conflicts["data.cache=true"] = "a cache is of one reducer: set data.cache=false"
    if cfg.control:
        conflicts["control=true"] = "a control has one budget: leave control out"
    for name in ("dominant", "contextual"):
        value = cfg.reducer.get(name)
        if value is not None:
            conflicts[f"reducer.{name}={value}"] = "each budget is split at the paper's ratio: leave it out"

    for setting, reason in conflicts.items():
        raise UserError(
            f"reducer.budget={budgets} does not go with {setting}, because {reason}; or give a single budget"
        )
