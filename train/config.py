"""The settings of a run: a typed schema, so that a mistyped name or value fails by name before any work.

Groups whose members differ (model, reducer, data, deepspeed, tune) are plain mappings here; their own YAML file is the
list of what can be set, and `_target_` names what they build.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from data.batches.dataset import BatchPlan
from data.examples.prepare import Selection
from data.paths import ROOT, data_dir
from train.budgets import budgets_of
from train.hardware import native_dtype
from vzip import UserError
from vzip.reducers import Reducer

NOT_PART_OF_A_RUN = ("fresh", "dry_run", "name", "runs", "track")
NOT_PART_OF_DATA = ("address", "pictures", "replace_unreachable", "num_workers")


@dataclass
class Optim:
    """AdamW with linear warmup and cosine decay to zero."""

    lr: float = 2e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup: float = 0.03
    """Share of the steps that the warmup takes."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm; 0 turns it off."""
    epochs: float = 1.0
    """Passes over the rows of the subset."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule is that of the shortened run."""


@dataclass
class Batch:
    """A step, and how it is cut into micro batches, which changes no gradient."""

    size: int = 128
    """Rows of a step, on all ranks."""
    tokens: int | None = None
    """engine=fast: packed tokens of one forward on one rank; null: as many as the memory holds."""
    recompute: bool | None = None
    """engine=fast: run the MLPs again in the backward pass, which halves the memory a token takes; null: where it is needed."""
    micro: int = 16
    """engine=reference: padded rows of one forward on one rank; also rows of one forward of `make cache`."""


@dataclass
class Evaluate:
    """Answers generated for held-out questions."""

    questions: int = 300
    """Questions asked, spread over the held-out rows; 0 turns the evaluation off."""
    batch: int = 32
    """Questions of one generate call on one rank."""
    max_new_tokens: int = 8
    baselines: bool = True
    """Also evaluate `full` (all tokens) and `free` (reduced) with the base projector, before tuning."""


@dataclass
class Config:
    """Everything a run depends on."""

    model: dict[str, Any] = MISSING
    reducer: dict[str, Any] = MISSING
    data: dict[str, Any] = MISSING
    deepspeed: dict[str, Any] = MISSING
    tune: dict[str, Any] = MISSING
    track: dict[str, Any] = MISSING
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    evaluate: Evaluate = field(default_factory=Evaluate)
    memory_gb: float | None = None
    """Of one card, in GB; null: what it has. Says how many tokens a micro batch may hold."""
    quantize: str | None = None
    """"nf4" or "int8": the frozen linear layers of the language model in 4 or 8 bits; the gradients are no longer exact."""
    engine: str = "fast"
    """"fast", or "reference": the plain way to the same gradients, padded and checkpointed, to compare with."""
    compile: bool | None = None
    """engine=fast: torch.compile norms and SwiGLU, which takes some 15 seconds once; null: on a GPU, where it pays."""
    seed: int = 0
    """Of the subset, the order and every random draw."""
    weights: str = "pretrained"
    """"pretrained", or "random" for the architecture alone (benchmarks, dry runs)."""
    save_every: int = 25
    """Steps between resumable states."""
    runs: str = "runs"
    """Folder of all runs."""
    name: str | None = None
    """Folder of this run below `runs`; by default made of the settings, so that the same command resumes."""
    fresh: bool = False
    """Start over, deleting what the run's folder holds."""
    dry_run: bool = False
    """Print the plan, and stop."""
    control: bool = False
    """Also tune a projector for as many random tokens, the same way, and show it as the row `random`."""


def instantiate_target(node: DictConfig, **more: Any) -> Any:
    """What the node's `_target_` makes of its settings and `more`. Raises UserError where they are wrong."""
    try:
        return instantiate(node, **more)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(
            f"{node['_target_']} can't be made with {OmegaConf.to_container(node)}: {error.__cause__}"
        ) from error


def build_reducers(cfg: DictConfig) -> list[Reducer]:
    """The run's reducers, one a budget; a budget is the total of as many tiles as the model's family counts."""
    if "budget" not in cfg.reducer:
        return [instantiate_target(cfg.reducer)]
    tiles = get_class(cfg.model["_target_"]).budget_tiles
    return [instantiate_target(cfg.reducer, budget=budget, tiles=tiles) for budget in budgets_of(cfg)]


def build_reducer(cfg: DictConfig) -> Reducer:
    """The run's reducer; of several the one of the largest budget, which no other needs more memory than."""
    budgets = budgets_of(cfg)
    return build_reducers(cfg)[budgets.index(max(budgets))]


def selection(cfg: DictConfig) -> Selection:
    """The rows that the run is tuned on."""
    data = cfg.data
    return Selection(
        path=str(Path(data.path).expanduser()),
        image_folder=str(Path(data.image_folder).expanduser()),
        fraction=data.fraction,
        seed=cfg.seed,
        sources=None if data.sources is None else tuple(data.sources),
        text_examples=data.text_examples,
    )


def held_out(cfg: DictConfig) -> Selection:
    """The rows whose questions are asked, the same in every run."""
    path, folder = (str(Path(given).expanduser()) for given in (cfg.data.held_out, cfg.data.image_folder))
    return Selection(path=path, image_folder=folder)


def asks_questions(cfg: DictConfig) -> bool:
    """Whether the run is evaluated."""
    return bool(cfg.evaluate.questions and cfg.data.held_out)


def register() -> None:
    """Make the schema and the resolvers `${data_dir:}`, `${root:}` and `${native_dtype:}` known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("data_dir", lambda: str(data_dir()), replace=True)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("native_dtype", native_dtype, replace=True)


def batch_plan(cfg: DictConfig, *, num_examples: int, world_size: int) -> BatchPlan:
    """Steps, and how each global batch is cut. Raises UserError if it can't be cut that way."""
    if not num_examples:
        raise UserError(
            f"no row of data.path={cfg.data.path} has an answer to learn from within data.max_tokens={cfg.data.max_tokens}; "
            f"give a LLaVA-format JSON file with some, or allow more tokens"
        )
    if cfg.batch.size > num_examples:
        raise UserError(
            f"batch.size={cfg.batch.size} is more than the {num_examples} rows that there are; choose at most as many, or a larger "
            f"data.fraction (now {cfg.data.fraction})"
        )
    if cfg.engine == "reference" and cfg.batch.size % (cfg.batch.micro * world_size):
        fits = [micro for micro in range(1, cfg.batch.size + 1) if cfg.batch.size % (micro * world_size) == 0]
        advice = (
            f"batch.micro can be {', '.join(map(str, fits))}"
            if fits
            else f"choose a multiple of {world_size}, or engine=fast"
        )
        raise UserError(
            f"batch.size={cfg.batch.size} is not a multiple of batch.micro={cfg.batch.micro} x {world_size} ranks; {advice}"
        )
    steps = max(1, round(cfg.optim.epochs * num_examples / cfg.batch.size))
    return BatchPlan(
        size=cfg.batch.size,
        world_size=world_size,
        num_steps=min(steps, cfg.optim.max_steps or steps),
        seed=cfg.seed,
    )


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The settings that make a run what it is: two runs with the same ones are the same run."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    kept = {str(key): value for key, value in settings.items() if key not in NOT_PART_OF_A_RUN}
    return kept | {
        "data": {key: value for key, value in settings["data"].items() if key not in NOT_PART_OF_DATA}
    }


def run_name(cfg: DictConfig) -> str:
    """`name`, or one made of model, reducer, budgets, tuned part and a hash of the settings."""
    if cfg.name:
        return str(cfg.name)
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:6]
    reducer = cfg.reducer["_target_"].rsplit(".", 1)[-1].lower()
    budget = "" if "budget" not in cfg.reducer else "".join(f"-{budget}" for budget in budgets_of(cfg))
    return f"{cfg.model.name}-{reducer}{budget}-{cfg.tune.name}-seed{cfg.seed}-{digest}"
