"""The held-out questions of a finished run: their pictures, and answers of rows that the run itself has not asked."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from data.conversations import Conversation
from train import config
from train.evaluate import AnswerFiles, Evaluator, SingleDevice
from train.examples import held_out_conversations
from train.ranks import init_distributed
from vzip import Comparison, UserError
from vzip.reducers import Reducer
from vzip.runs.projector import ADAPTER


def settings_of(run: Path) -> DictConfig:
    """The settings of a run. Raises UserError for a folder without them, or in which they can't be read."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run} has no config.yaml, so its held-out questions are not known; give a folder that a run wrote"
        )
    try:
        cfg = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} holds no settings; give a folder that a run wrote")
    return cfg


def with_pictures(run: Path) -> list[tuple[Conversation, Path]]:
    """The held-out rows of a run that have a picture, each with the path of its first one; none where it asks no questions.

    Raises:
        UserError: a run whose data is no longer there.
    """
    cfg = settings_of(run)
    if not config.asks_questions(cfg):
        return []
    init_distributed()
    folder = Path(cfg.data.image_folder).expanduser()
    return [(row, folder / row.images[0]) for row in held_out_conversations(cfg) if row.images]


def held_out_with_pictures(run: Path) -> list[tuple[Conversation, Path]]:
    """`with_pictures`, of which there are some.

    Raises:
        UserError: a run without such questions, or whose data is no longer there.
    """
    cfg = settings_of(run)
    if not config.asks_questions(cfg):
        raise UserError(
            f"{run} has no held-out questions: data.held_out was not set, or evaluate.questions was 0"
        )
    if not (found := with_pictures(run)):
        raise UserError(f"{run}: no held-out question has a picture, in data.held_out={cfg.data.held_out}")
    return found


def free_row(
    run: Path, comparison: Comparison, reducer: Reducer, *, name: str, folder: Path
) -> dict[str, Any]:
    """A row of result.json of the run's base model and starting projector behind any reducer, asked as in the run.

    Args:
        run: a finished run.
        comparison: opened on it.
        reducer: in front of the projector.
        name: of the row.
        folder: that keeps the answers, as answers_NAME.json.

    Raises:
        UserError: a run without held-out questions, with LoRA, whose starting projector is gone, or a budget that does not fit.
    """
    cfg = settings_of(run)
    if (run / ADAPTER).is_dir():
        raise UserError(
            f"{run} was tuned with LoRA, beside which no other rows are asked; give --runs with finished runs"
        )
    init_distributed()
    comparison.attach("full").detach()  # which leaves the starting projector in place
    evaluator = Evaluator(
        cfg,
        SingleDevice(comparison.family),
        AnswerFiles(folder),
        comparison.processor,
        config.instantiate_target(cfg.model.template),
    )
    (setting,) = evaluator.ask(name, [reducer])
    return setting.row
