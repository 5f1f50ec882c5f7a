"""Check the settings of a run before any work starts.

The types and limits of single settings stand in train/settings.py. This module checks names, because
Hydra accepts any name that is added with a plus. It also refuses settings that do not go together.
"""

from dataclasses import Field, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from train.config import budgets_of
from train.settings import (
    Config,
    GradientEngine,
    LoraSettings,
    ReducerSettings,
    check_not_renamed,
    unknown_setting,
)
from vzip import UserError
from vzip.errors import check_choice

OPEN_GROUPS = {"reducer": ReducerSettings}
"""Groups whose members have settings of their own, with the settings that are common to them."""

LARGEST_OPTIM = {"lr": 1e3, "weight_decay": 1e3, "max_grad_norm": 1e9, "epochs": 1e4}
"""The largest values that can make sense. Far larger ones fail in the arithmetic of float32."""

# What messages call the types.
TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def check(cfg: DictConfig) -> None:
    """Check all settings. Raises UserError for the first one that is wrong."""
    # Single settings come first, because the rules below read them.
    _check_group("", cfg, Config)
    for group, schema in OPEN_GROUPS.items():
        _check_group(f"{group}.", cfg[group], schema, is_open=True)
    _check_optim(cfg)
    _check_tune(cfg)
    _check_deepspeed(cfg)
    _check_budgets(cfg)


def _check_group(prefix: str, group: DictConfig, schema: Any, *, is_open: bool = False) -> None:
    """Check the names and values of a group, and of the groups in it.

    Args:
        prefix: what stands in front of a setting's name, such as "optim.".
        group: the settings.
        schema: the dataclass that lists them.
        is_open: whether settings that are not listed are allowed.
    """
    # A wrong name is an error even if its value would be right.
    known = {field.name: field for field in fields(schema)}
    for key in group:
        name = f"{prefix}{key}"
        check_not_renamed(name)
        if key not in known and not is_open:
            raise unknown_setting(name)

    # An open group may leave a setting out: the reducer's class has its own default.
    for key, field in known.items():
        if key not in group:
            continue
        if is_dataclass(field.type):
            _check_group(f"{prefix}{key}.", group[key], field.type)
        else:
            _check_value(f"{prefix}{key}", group[key], field)


def _check_value(name: str, value: Any, field: Field[Any]) -> None:
    """Check the type and the limits of one setting."""
    # Hydra has already refused null where it is not allowed.
    if value is None:
        return

    # A setting that may be null has a union of two types, and null is the second one.
    kind = get_args(field.type)[0] if isinstance(field.type, UnionType) else field.type
    if isinstance(kind, type) and issubclass(kind, Enum):
        check_choice(name, str(value), [member.value for member in kind])
    elif kind in TYPES and not _is_a(value, kind):
        raise UserError(f"{name}={value} must be {TYPES[kind]}")

    # The type is right, so the limits can be compared.
    check = field.metadata.get("check")
    if check is not None:
        check(name, value)


def _is_a(value: Any, kind: type) -> bool:
    """Tell whether a value has a type. A whole number is a number too, but true is no number."""
    # In Python, true is also the whole number 1.
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _check_optim(cfg: DictConfig) -> None:
    """Check that AdamW's settings are not so large that weights would leave the range of float32."""
    for name, most in LARGEST_OPTIM.items():
        value = cfg.optim[name]
        if value > most:
            raise UserError(f"optim.{name}={value} must be at most {most:g}")

    # AdamW multiplies the weights by 1 - lr * weight_decay in each step.
    decay = cfg.optim.lr * cfg.optim.weight_decay
    if decay > 1:
        raise UserError(
            f"optim.weight_decay={cfg.optim.weight_decay} with optim.lr={cfg.optim.lr} multiplies the "
            f"weights by {1 - decay:g} in each step; lower one of them, so that their product is at most 1"
        )


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

    # `tune.lora` is open in the schema, because it may be null: check what it holds here.
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
            f"quantize={cfg.quantize} does not go with ZeRO 3, which can't share quantized weights: "
            f"set deepspeed=zero0"
        )


def _check_budgets(cfg: DictConfig) -> None:
    """Check a list of budgets, and the settings that only go with a single budget."""
    budgets = budgets_of(cfg)
    if not OmegaConf.is_list(cfg.reducer.get("budget")):
        return

    # Collect the conflicting settings, each with the reason and what to do.
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

    # Report the first conflict: the next run reports the next one.
    for setting, reason in conflicts.items():
        raise UserError(
            f"reducer.budget={budgets} does not go with {setting}, because {reason}; or give a single budget"
        )
