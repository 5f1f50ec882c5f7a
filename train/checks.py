"""What no run can have: settings are refused by name before any work."""

import difflib
import math
import re
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from data.paths import ROOT
from train.budgets import check_budgets
from train.config import Batch, Config, Evaluate, Optim
from vzip import UserError
from vzip.errors import check_choice, check_count

POSITIVE = (
    "batch.size",
    "batch.micro",
    "batch.tokens",
    "memory_gb",
    "save_every",
    "optim.epochs",
    "optim.lr",
    "optim.max_steps",
    "evaluate.batch",
    "evaluate.max_new_tokens",
    "model.num_frames",
)
NOT_NEGATIVE = ("optim.weight_decay", "optim.max_grad_norm", "evaluate.questions")
WHOLE = {"data.max_tokens": 1, "data.num_workers": 0}
"""The least of each. Groups have no schema, so that their types are looked at too."""
SWITCHES = ("data.cache", "data.text_rows", "data.replace_unreachable", "tune.projector")
GROUPS = {"optim": Optim, "batch": Batch, "evaluate": Evaluate}
CHOICES = {
    "engine": ("fast", "reference"),
    "weights": ("pretrained", "random"),
    "model.dtype": (
        "float32",
        "bfloat16",
        "float64",
    ),  # float16's gradients, of a loss in the mean over a step, fade
}


def _check_names(cfg: DictConfig) -> None:
    """Hydra adds whatever stands behind a plus, as its own advice about a mistyped setting has it."""
    known = {f"{group}.": [field.name for field in fields(of)] for group, of in GROUPS.items()}
    known |= {
        "": [field.name for field in fields(Config)],
        "data.": list(OmegaConf.load(ROOT / "configs/data/own.yaml")),
    }
    names = {name: prefix + name for prefix, group in known.items() for name in group}
    for prefix, group in known.items():
        for key in cfg[prefix[:-1]] if prefix else cfg:
            if key not in group:
                near = [
                    f"; did you mean {names[name]}?" for name in difflib.get_close_matches(str(key), names, 1)
                ]
                raise UserError(f"{prefix}{key} is no setting{''.join(near)}")


def _check_name(cfg: DictConfig) -> None:
    if cfg.name is not None and not re.fullmatch(r"[\w-][\w.-]*", cfg.name):
        raise UserError(
            f"name={cfg.name} must be the name of a folder below runs={cfg.runs}: letters, digits, '-', '_' and '.'"
        )


def _check_optim(cfg: DictConfig) -> None:
    if not 0 <= cfg.optim.warmup < 1:
        raise UserError(
            f"optim.warmup={cfg.optim.warmup} must lie in [0, 1): the share of steps that warm up"
        )
    if len(cfg.optim.betas) != 2 or not all(0 <= beta < 1 for beta in cfg.optim.betas):
        raise UserError(f"optim.betas={cfg.optim.betas} must be two numbers in [0, 1), e.g. [0.9,0.999]")


def _check_data(cfg: DictConfig) -> None:
    fraction, sources = cfg.data.fraction, cfg.data.sources
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be a number in (0, 1]; 0.1 is a tenth")
    if sources is not None and (not OmegaConf.is_list(sources) or not sources):
        raise UserError(
            f"data.sources={sources} must be a list of sources, e.g. [coco, gqa], or null for all"
        )


def _check_tune(cfg: DictConfig) -> None:
    lora = cfg.tune.lora
    if lora is None:
        if not cfg.tune.projector:
            raise UserError(
                "tune.projector=false and tune.lora=null tune nothing; use tune=projector or tune=projector_lora"
            )
        return
    if not OmegaConf.is_dict(lora):
        raise UserError(
            f"tune.lora={lora} must be null or a mapping; use tune=projector_lora or tune=language_lora"
        )
    check_choice("tune.lora.target", lora.target, ("projector", "language_model"))
    check_count("tune.lora.r", lora.r, 1)


def _check_quantize(cfg: DictConfig) -> None:
    if cfg.quantize not in (None, "nf4", "int8"):
        raise UserError(f"quantize={cfg.quantize} must be one of: nf4, int8; or null, for exact gradients")
    if cfg.quantize and cfg.deepspeed.zero_optimization.stage == 3:
        raise UserError(
            f"quantize={cfg.quantize} does not go with ZeRO 3, which can't share quantised weights: deepspeed=zero0"
        )


def _check_numbers(cfg: DictConfig) -> None:
    for name in POSITIVE:
        value = OmegaConf.select(cfg, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name}={value} must be positive")
    for name in NOT_NEGATIVE:
        if not 0 <= (value := OmegaConf.select(cfg, name)) < math.inf:
            raise UserError(f"{name}={value} must be at least 0")
    for name, least in WHOLE.items():
        check_count(name, OmegaConf.select(cfg, name), least)


def check(cfg: DictConfig) -> None:
    """Raises UserError for values that no run can have."""
    _check_names(cfg)
    _check_numbers(cfg)
    for name in SWITCHES:
        if not isinstance(value := OmegaConf.select(cfg, name), bool):
            raise UserError(f"{name}={value} must be true or false")
    for name, allowed in CHOICES.items():
        check_choice(name, OmegaConf.select(cfg, name), allowed)
    for part in (_check_name, _check_optim, _check_data, _check_tune, _check_quantize, check_budgets):
        part(cfg)
