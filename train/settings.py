"""The list of all settings of a run.

Each setting has a type, a default and one line that says what it does. A setting with limits also
has a function that checks them. A default of MISSING means that the YAML files in configs/ set it.
Two groups are open, because their members have settings of their own: `reducer` and `deepspeed`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING, OmegaConf

from vzip.errors import UserError

RENAMED = {"inexact": "quantize", "data.text_rows": "data.text_examples"}
"""Former names of settings, with their new names."""

Check = Callable[[str, Any], None]
"""Takes the name and the value of a setting. Raises UserError for a value that is not allowed."""


def check_not_renamed(name: str) -> None:
    """Raise UserError, with the new name, if a setting has been renamed."""
    if name in RENAMED:
        raise UserError(f"{name} is no setting any more: it was renamed to {RENAMED[name]}")


def positive(name: str, value: float) -> None:
    """Check that a number is above 0."""
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value} must be positive")


def not_negative(name: str, value: float) -> None:
    """Check that a number is 0 or more."""
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value} must be at least 0")


def at_least_one(name: str, value: int) -> None:
    """Check that a count is 1 or more."""
    if value < 1:
        raise UserError(f"{name}={value} must be a whole number, at least 1")


def share(name: str, value: float) -> None:
    """Check that a number is a share, and not 0."""
    if not 0 < value <= 1:
        raise UserError(f"{name}={value} must be a number in (0, 1]; 0.1 is a tenth")


def share_of_steps(name: str, value: float) -> None:
    """Check the share of the steps that warm up."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value} must lie in [0, 1): the share of steps that warm up")


def two_betas(name: str, value: Any) -> None:
    """Check the two betas of AdamW."""
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise UserError(f"{name}={value} must be two numbers in [0, 1), e.g. [0.9,0.999]")


def names_of_sources(name: str, value: Any) -> None:
    """Check a list of sources."""
    if not OmegaConf.is_list(value) or not value:
        raise UserError(f"{name}={value} must be a list of sources, e.g. [coco, gqa], or null for all")


def folder_name(name: str, value: str) -> None:
    """Check that a name can be that of a folder."""
    if not re.fullmatch(r"[\w-][\w.-]*", value):
        raise UserError(
            f"{name}={value} must be the name of a folder below `runs`: letters, digits, '-', '_' and '.'"
        )


def checked(default: Any, check: Check) -> Any:
    """Make a field with a default and a check of its values. Null is not checked."""
    return field(default=default, metadata={"check": check})


class GradientEngine(StrEnum):
    """The two paths to the same gradients."""

    fast = "fast"
    reference = "reference"


class StartingWeights(StrEnum):
    """The weights that a model starts from."""

    pretrained = "pretrained"
    random = "random"


class Quantization(StrEnum):
    """Formats of a quantized language model."""

    nf4 = "nf4"
    int8 = "int8"


class ModelDtype(StrEnum):
    """Precisions of a model.

    float16 is not among them: gradients of a loss that is averaged over a step underflow in it.
    """

    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class AspectRatio(StrEnum):
    """What is done to a picture that is not square, in LLaVA's words."""

    pad = "pad"
    square = "square"


class LoraTarget(StrEnum):
    """The parts of a model that LoRA can adapt."""

    projector = "projector"
    language_model = "language_model"


@dataclass
class ModelSettings:
    """The model, and how it is asked."""

    _target_: str = MISSING
    """Class of its family, in vzip/families."""
    name: str = MISSING
    """Short name, which the names of runs begin with."""
    id: str = MISSING
    """Hub id, or folder."""
    projector: str | None = MISSING
    """File of the projector that training starts from; null: the one in the model's own weights."""
    template: dict[str, Any] = MISSING
    """Conversation format: a function in vzip/templates, and its settings."""
    budget: Any = MISSING
    """Default of reducer.budget."""
    num_frames: int = checked(1, positive)
    """Frames of a video."""
    image_aspect_ratio: AspectRatio | None = None
    """"pad": pad pictures to squares, as LLaVA-1.5 does; "square": don't; null: as the processor does."""
    dtype: ModelDtype = MISSING
    """Precision of the frozen weights. The trainable ones are float32."""
    architecture: dict[str, Any] = MISSING
    """Configuration of the model in `transformers`, for dry runs and for weights=random."""


@dataclass
class ReducerSettings:
    """Settings of all reducers. The others are the parameters of a reducer's class."""

    _target_: str = MISSING
    """Class of the reducer, in vzip/reducers."""
    budget: Any = None
    """Visual tokens per image, tile or frame (LLaVA-NeXT: of 5 tiles together).

    A list tunes one projector for all of them.
    """
    anyres: str = "released"
    """Order of the tokens of tiles: "released" (authors' code), or "spatial" (no padding, rows marked)."""


@dataclass
class ExpectedData:
    """An estimate of the data, which a dry run counts with before there is any."""

    rows: int = checked(MISSING, positive)
    """Number of examples."""
    text_tokens: int = checked(MISSING, positive)
    """Mean text tokens of an example."""
    longest: int = checked(MISSING, positive)
    """Text tokens of the longest example."""
    image_size: list[int] = field(default_factory=lambda: [480, 640])
    """Height and width of an image, in pixels."""
    media: str = "image"
    """"image" or "video"."""


@dataclass
class DataSettings:
    """The training data, and the held-out questions."""

    path: str = MISSING
    """LLaVA-format JSON or JSONL file, or folder of Hugging Face datasets with pictures inside."""
    address: str | None = None
    """Where `make data` fetches that file, if it is missing."""
    image_folder: str = MISSING
    """Folder that the paths in the examples start from. May be read-only if nothing is missing."""
    pictures: dict[str, Any] = field(default_factory=dict)
    """For each source, the addresses, folders or zip files that pictures are fetched from, in turn."""
    replace_unreachable: bool = False
    """Replace an example also if a server did not answer, and not only if its picture is gone."""
    held_out: str | None = None
    """File of the held-out questions, with pictures in the same folder; null: no evaluation."""
    fraction: float = checked(1.0, share)
    """Share of each source that is drawn, by `seed`."""
    sources: Any = field(default=None, metadata={"check": names_of_sources})
    """List of the sources to draw from, e.g. [coco, gqa]; null: all."""
    text_examples: bool = True
    """Also draw examples without an image or video."""
    max_tokens: int = checked(2048, at_least_one)
    """Text tokens at which an example is cut."""
    num_workers: int = checked(4, not_negative)
    """Processes per rank that decode pictures, at most one per CPU; 0: the rank itself does it."""
    cache: bool = False
    """Tune from the reducer's output that `make cache` has stored, without pictures."""
    expected: ExpectedData = MISSING


@dataclass
class LoraSettings:
    """Low-rank adapters beside frozen layers."""

    target: LoraTarget = MISSING
    """Part whose linear layers get adapters."""
    r: int = checked(MISSING, at_least_one)
    """Rank."""
    alpha: float = checked(MISSING, positive)
    """Scale: adapters count alpha / r."""


@dataclass
class TuneSettings:
    """The trainable parts."""

    name: str = MISSING
    """Name of the choice, which the names of runs carry."""
    projector: bool = MISSING
    """Tune the weights of the projector itself."""
    lora: Any = None
    """Target, r and alpha of LoRA; null: no LoRA."""


@dataclass
class TrackSettings:
    """Where metrics go beside metrics.jsonl."""

    wandb: bool = MISSING
    """Log to wandb."""
    project: str | None = MISSING
    """Project in wandb."""
    media: bool = False
    """Also send held-out pictures, questions and answers to wandb, not only numbers."""


@dataclass
class OptimSettings:
    """AdamW with linear warmup and cosine decay to zero."""

    lr: float = checked(2e-5, positive)
    """Peak learning rate."""
    weight_decay: float = checked(0.0, not_negative)
    """Weight decay of AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"check": two_betas})
    """Both betas of AdamW."""
    warmup: float = checked(0.03, share_of_steps)
    """Share of the steps that warm up."""
    max_grad_norm: float = checked(1.0, not_negative)
    """2-norm that gradients are clipped to; 0: no clipping."""
    epochs: float = checked(1.0, positive)
    """Passes over the training examples."""
    max_steps: int | None = checked(None, positive)
    """Stop after this many steps. The learning rate decays over the shortened run."""


@dataclass
class BatchSettings:
    """A step, and how it is cut into micro batches. The cut changes no gradient."""

    size: int = checked(128, positive)
    """Examples per optimizer step, over all ranks (global batch size)."""
    tokens: int | None = checked(None, positive)
    """engine=fast: packed tokens per forward and rank; null: as many as the memory holds."""
    recompute: bool | None = None
    """engine=fast: recompute the MLPs in the backward pass, for half the memory per token.

    null: only if memory is short.
    """
    micro: int = checked(16, positive)
    """engine=reference: padded examples per forward and rank.

    Also the examples per forward of `make cache`.
    """


@dataclass
class EvaluateSettings:
    """Answers to held-out questions."""

    questions: int = checked(300, not_negative)
    """Number of questions, the first ones in data.held_out; 0: no evaluation."""
    batch: int = checked(32, positive)
    """Questions per generate call and rank."""
    max_new_tokens: int = checked(8, positive)
    """Longest answer, in tokens."""
    baselines: bool = True
    """Also evaluate before tuning: `full` (all tokens) and `free` (reduced, training-free)."""


@dataclass
class Config:
    """All settings of a run."""

    model: ModelSettings = MISSING
    reducer: dict[str, Any] = MISSING
    """The settings in `ReducerSettings`, and the parameters of the reducer's class."""
    data: DataSettings = MISSING
    deepspeed: dict[str, Any] = MISSING
    """DeepSpeed's own settings, such as zero_optimization.stage (0, 1, 2 or 3)."""
    tune: TuneSettings = MISSING
    track: TrackSettings = MISSING
    optim: OptimSettings = field(default_factory=OptimSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    memory_gb: float | None = checked(None, positive)
    """Memory of one GPU in GB, which limits the tokens of a micro batch; null: what the GPU has."""
    quantize: Quantization | None = None
    """Hold the frozen language model in 4 ("nf4") or 8 bits ("int8"); gradients are no longer exact."""
    engine: GradientEngine = GradientEngine.fast
    """"fast", or "reference": padded batches and activation checkpoints, slow, for comparison."""
    compile: bool | None = None
    """engine=fast: compile norms and SwiGLU (torch.compile), about 15 s once; null: on a GPU."""
    seed: int = 0
    """Seed of the subset, the order of the examples and all random draws."""
    weights: StartingWeights = StartingWeights.pretrained
    """"pretrained", or "random": the architecture alone, for benchmarks and dry runs."""
    save_every: int = checked(25, positive)
    """Steps between resumable states."""
    runs: str = "runs"
    """Folder of all runs."""
    name: str | None = checked(None, folder_name)
    """Folder of this run below `runs`; null: named by its settings, so the same command resumes."""
    fresh: bool = False
    """Start over: delete what the run's folder holds."""
    dry_run: bool = False
    """Print the plan, and stop."""
    control: bool = False
    """Also tune a projector for as many random tokens: the setting `random` in the results."""


def setting_names(schema: Any = Config, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all settings, such as "optim.lr". An open group is one setting."""
    for setting in fields(schema):
        if is_dataclass(setting.type):
            yield from setting_names(setting.type, f"{prefix}{setting.name}.")
        else:
            yield prefix + setting.name


def unknown_setting(name: str) -> UserError:
    """Make the error about a name that is no setting, with the most similar name."""
    names = list(setting_names())
    by_last_part = {known.rsplit(".", 1)[-1]: known for known in names}
    similar = difflib.get_close_matches(name, names, 1)

    # The group may be missing, as in "lr": then compare with the last part of each name.
    if not similar:
        last_parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, 1)
        similar = [by_last_part[part] for part in last_parts]
    hint = f"; did you mean {similar[0]}?" if similar else ""
    return UserError(f"{name} is no setting{hint}")


def check_argument(argument: str) -> None:
    """Check the name of a setting on the command line, NAME=VALUE.

    Hydra checks it too, but it knows no renamed settings and suggests no similar name. Hydra and
    `train.checks` check the names in open groups, and the names that a plus adds.

    Raises:
        UserError: the setting was renamed, or does not exist.
    """
    name, equals, _ = argument.lstrip("+~").partition("=")
    check_not_renamed(name)
    if argument.startswith(("+", "~", "-")) or not equals:
        return

    closed = [group.name for group in fields(Config) if is_dataclass(group.type)]
    group, _, rest = name.partition(".")
    if not rest or group not in closed:
        return

    # A setting may itself be a mapping, such as model.template, whose keys are free.
    names = list(setting_names())
    is_part = any(name.startswith(f"{known}.") for known in names)
    if name not in names and not is_part:
        raise unknown_setting(name)
