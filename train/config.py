"""Settings from the command line, and what is built from them: reducers, data, steps, names."""

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from data.batches.dataset import BatchPlan
from data.examples.prepare import Selection
from data.paths import ROOT, data_dir
from train.cli import exit_on_user_error
from train.hardware import native_dtype
from train.settings import Config, GradientEngine, LoraSettings, ReducerSettings, check_argument
from vzip import UserError, reducers, templates
from vzip.errors import check_choice
from vzip.families import Family, families
from vzip.families.anyres import ANYRES
from vzip.reducers import Reducer

NOT_PART_OF_A_RUN = ("fresh", "dry_run", "name", "runs", "track")
"""Settings that may change without making another run."""

NOT_PART_OF_DATA = ("address", "pictures", "replace_unreachable", "num_workers")
"""Settings of the group `data` that may change without making another run.

They say how the data gets here. What it consists of stays the same.
"""

HELP_WIDTH = 100
"""Columns of the help text."""

HELP_INDENT = 30
"""Columns of the names in the help text, in front of the descriptions."""

NESTED = {"reducer": ReducerSettings, "tune.lora": LoraSettings}
"""Settings that are groups, although the schema leaves them open."""


@exit_on_user_error
def register() -> None:
    """Make the schema and the resolvers known to Hydra, such as `${data_dir:}`.

    A renamed or mistyped setting on the command line ends the command here, because Hydra's message
    would not name the right one.
    """
    for argument in sys.argv[1:]:
        check_argument(argument)

    # The schema gives types and defaults. The resolvers compute values that the YAML files ask for.
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("data_dir", lambda: str(data_dir()), replace=True)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("native_dtype", native_dtype, replace=True)
    OmegaConf.register_new_resolver("settings_help", settings_help, replace=True)


def compose_settings(*overrides: str) -> DictConfig:
    """Compose the settings that `python train/tune.py OVERRIDES` runs with."""
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("tune", overrides=list(overrides))


def _field_texts(schema: type) -> dict[str, str]:
    """Read the descriptions of a dataclass's fields: the strings below them, by their names."""
    # Python does not keep these strings, so they are read from the source.
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)

    # A string belongs to the field above it.
    texts: dict[str, str] = {}
    name = ""
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            texts[name] = " ".join(str(statement.value.value).split())
    return texts


def describe_settings(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the description of each setting, in the order of the schema."""
    texts = _field_texts(schema)
    for field in fields(schema):
        name = f"{prefix}{field.name}"

        # A group is listed by its settings. A nested one is a setting itself, too.
        group = field.type if is_dataclass(field.type) else NESTED.get(name)
        if group is None or name in NESTED:
            yield name, texts[field.name]
        if group is not None:
            yield from describe_settings(group, f"{name}.")


def settings_help() -> str:
    """Format all settings as a text of two columns."""
    indent = " " * HELP_INDENT
    lines = []
    for name, description in describe_settings():
        text = textwrap.fill(description, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent)

        # The name takes the place of the first line's indentation.
        lines.append(f"{name} ".ljust(HELP_INDENT) + text[HELP_INDENT:])
    return "\n".join(lines)


def _full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _buildable() -> dict[str, Any]:
    """List the reducers and templates that settings may build, by the names of their `_target_`."""
    # Settings may come with a stranger's run, so no name in them is ever imported.
    buildable = {}
    for name in reducers.names():
        reducer = reducers.reducer_class(name)
        buildable[_full_name(reducer)] = reducer
    for name in templates.__all__:
        buildable[f"{templates.__name__}.{name}"] = getattr(templates, name)
    return buildable


def instantiate_target(node: DictConfig, **more: Any) -> Any:
    """Build the reducer or the template that `_target_` names, from the node's settings and `more`.

    Raises:
        UserError: `_target_` names anything else, or the settings are wrong.
    """
    settings = OmegaConf.to_container(node, resolve=True)
    assert isinstance(settings, dict)
    target = settings.pop("_target_", None)
    buildable = _buildable()
    if not isinstance(target, str) or target not in buildable:
        raise UserError(
            f"_target_={target} is nothing that settings can build; choose one of: {', '.join(buildable)}"
        )

    # No reducer and no template takes a group of settings, so nothing may be hidden in one.
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(each, dict | list) for each in values):
            raise UserError(f"{target} takes no group of settings, but {name} holds one; leave it out")
    try:
        return buildable[target](**{**settings, **more})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{target} can't be made with {settings}: {error}") from error


def family_class(cfg: DictConfig) -> type[Family]:
    """Return the family that `model._target_` names. Raises UserError if it names anything else."""
    by_name = {_full_name(family): family for family in families().values()}
    target = cfg.model["_target_"]
    if not isinstance(target, str) or target not in by_name:
        raise UserError(
            f"model._target_={target} is no family of models; choose one of: {', '.join(by_name)}"
        )
    return by_name[target]


def budgets_of(cfg: DictConfig) -> list[Any]:
    """Return the run's budgets in their order: those of a list, or the only one, which may be None.

    Raises:
        UserError: the list is empty, or holds anything but different whole numbers.
    """
    budget = cfg.reducer.get("budget")
    if keeps_a_share(cfg):
        return [None]
    if not OmegaConf.is_list(budget):
        return [budget]

    # Budgets name settings in the results, so each may stand there once. `true` is no number here.
    budgets = list(budget)
    are_counts = all(type(each) is int and each >= 1 for each in budgets)
    if not budgets or not are_counts or len(set(budgets)) < len(budgets):
        raise UserError(
            f"reducer.budget={budget} must be a whole number, or a list of different ones, each at least 1, "
            f"e.g. [64, 128, 192]"
        )
    return budgets


def keeps_a_share(cfg: DictConfig) -> bool:
    """Tell whether `reducer.keep` is given, instead of a budget.

    Raises:
        UserError: both are given.
    """
    if cfg.reducer.get("keep") is None:
        return False

    # The budget of the model stands in the settings anyway, so only another one is the user's.
    budget = cfg.reducer.get("budget")
    if budget is not None and budget != cfg.model.get("budget"):
        raise UserError(
            f"reducer.keep={cfg.reducer.keep} and reducer.budget={budget} can't be met together; "
            f"give one of them"
        )
    return True


def build_reducers(cfg: DictConfig) -> list[Reducer]:
    """Build one reducer per budget."""
    # `anyres` stands among the reducer's settings, but belongs to the family: check it, and leave
    # it out.
    tile_order(cfg)
    settings = OmegaConf.create({key: value for key, value in cfg.reducer.items() if key != "anyres"})
    if "budget" not in settings:
        return [instantiate_target(settings)]

    # A budget counts the tokens of several tiles together, so reducers get their number.
    tiles = family_class(cfg).budget_tiles
    return [instantiate_target(settings, budget=budget, tiles=tiles) for budget in budgets_of(cfg)]


def tile_order(cfg: DictConfig) -> str:
    """Return `reducer.anyres`, the order of the tokens of several tiles, which the family applies.

    Raises:
        UserError: an order that does not exist.
    """
    order: str = cfg.reducer.get("anyres", "released")
    check_choice("reducer.anyres", order, ANYRES)
    return order


def build_reducer(cfg: DictConfig) -> Reducer:
    """Build the reducer with the largest budget, which needs the most memory."""
    budgets = budgets_of(cfg)
    return build_reducers(cfg)[budgets.index(max(budgets))]


def selection(cfg: DictConfig) -> Selection:
    """Return which training examples to draw."""
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
    """Return which held-out examples to ask about, the same in every run."""
    return Selection(
        path=str(Path(cfg.data.held_out).expanduser()),
        image_folder=str(Path(cfg.data.image_folder).expanduser()),
    )


def asks_questions(cfg: DictConfig) -> bool:
    """Tell whether the run is evaluated."""
    return bool(cfg.evaluate.questions and cfg.data.held_out)


def _check_micro(cfg: DictConfig, world_size: int) -> None:
    """Raise UserError if the reference's micro batches don't add up to a step."""
    size = cfg.batch.size
    if size % (cfg.batch.micro * world_size) == 0:
        return

    # Name the sizes that would fit, if there are any.
    fitting = [micro for micro in range(1, size + 1) if size % (micro * world_size) == 0]
    advice = f"choose a multiple of {world_size}, or engine=fast"
    if fitting:
        advice = f"batch.micro can be {', '.join(map(str, fitting))}"
    raise UserError(
        f"batch.size={size} is not a multiple of batch.micro={cfg.batch.micro} x {world_size} ranks; {advice}"
    )


def batch_plan(cfg: DictConfig, *, num_examples: int, world_size: int) -> BatchPlan:
    """Plan the number of steps, and how each global batch is cut.

    Raises UserError if it can't be cut that way.
    """
    # Refuse a batch that the data can't fill: fewer examples would be another experiment.
    if not num_examples:
        raise UserError(
            f"no example of data.path={cfg.data.path} has an answer to learn from within "
            f"data.max_tokens={cfg.data.max_tokens}; give a LLaVA-format JSON file with some, or allow "
            f"more tokens"
        )
    if cfg.batch.size > num_examples:
        raise UserError(
            f"batch.size={cfg.batch.size} is more than the {num_examples} examples that there are; "
            f"choose at most as many, or a larger data.fraction (now {cfg.data.fraction})"
        )
    if cfg.engine == GradientEngine.reference:
        _check_micro(cfg, world_size)

    # A part of an epoch is rounded to whole steps, and takes at least one.
    steps = max(1, round(cfg.optim.epochs * num_examples / cfg.batch.size))
    return BatchPlan(
        size=cfg.batch.size,
        world_size=world_size,
        num_steps=min(steps, cfg.optim.max_steps or steps),
        seed=cfg.seed,
    )


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings that make a run what it is. Two runs that share them are the same run."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return own_settings({str(name): value for name, value in settings.items()})


def own_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what changes where a run goes, or how its data gets here, but not what it learns.

    The settings may come from a file that is damaged.
    """
    own = {name: value for name, value in settings.items() if name not in NOT_PART_OF_A_RUN}
    if isinstance(own.get("data"), dict):
        own["data"] = {name: value for name, value in own["data"].items() if name not in NOT_PART_OF_DATA}
    return own


def run_name(cfg: DictConfig) -> str:
    """Return `name`, or make one of model, reducer, budgets, trainable parts, seed and a hash."""
    if cfg.name:
        return str(cfg.name)

    # The hash tells runs apart that differ in other settings.
    digest = hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:6]
    reducer = cfg.reducer["_target_"].rsplit(".", 1)[-1].lower()
    budgets = budgets_of(cfg) if "budget" in cfg.reducer else []
    if keeps_a_share(cfg):
        budgets = [f"keep{cfg.reducer.keep}"]
    words = [cfg.model.name, reducer, *budgets, cfg.tune.name, f"seed{cfg.seed}", digest]
    return "-".join(map(str, words))
