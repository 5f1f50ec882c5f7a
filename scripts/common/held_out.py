"""The held-out questions of a finished run: their pictures, and answers with other reducers."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.conversations import Conversation
from train.config import asks_questions
from train.evaluation.evaluator import AnswerFiles, Evaluator, SingleDevice
from train.examples import held_out_conversations
from train.runs import FinishedRun
from vzip import Comparison, UserError
from vzip.reducers import Reducer
from vzip.runs.meta import ADAPTER, template_of


def _pictures(cfg: DictConfig) -> list[tuple[Conversation, Path]]:
    """List the held-out conversations with a picture, each with the path of its first one."""
    # Several images may stand in a conversation, and the first one is enough to show it.
    folder = Path(cfg.data.image_folder).expanduser()
    pictures = []
    for conversation in held_out_conversations(cfg):
        if conversation.images:
            pictures.append((conversation, folder / conversation.images[0]))
    return pictures


def with_pictures(run: Path) -> list[tuple[Conversation, Path]]:
    """List a run's held-out conversations with a picture, each with the path of its first one.

    The list is empty for a run that asks no questions.

    Raises:
        UserError: the folder has no settings, or the run's data is gone.
    """
    finished = FinishedRun(run)
    with finished.explained():
        cfg = finished.settings
        return _pictures(cfg) if asks_questions(cfg) else []


def held_out_with_pictures(run: Path) -> list[tuple[Conversation, Path]]:
    """List the same as `with_pictures`. Raise an error instead of returning an empty list.

    Raises:
        UserError: the run asks no questions, none of them has a picture, or the run's data is gone.
    """
    finished = FinishedRun(run)
    with finished.explained():
        cfg = finished.settings
        if not asks_questions(cfg):
            raise UserError(
                f"{run} has no held-out questions: data.held_out was not set, or evaluate.questions was 0"
            )
        pictures = _pictures(cfg)

    if not pictures:
        raise UserError(f"{run}: no held-out question has a picture, in data.held_out={cfg.data.held_out}")
    return pictures


def ask_training_free(
    run: Path, comparison: Comparison, reducer: Reducer, *, name: str, folder: Path
) -> dict[str, Any]:
    """Ask a run's held-out questions with its base model and starting projector, and any reducer.

    Args:
        run: a finished run.
        comparison: opened on that run.
        reducer: reduces the tokens in front of the projector.
        name: name of the setting.
        folder: keeps the answers, as answers_NAME.json, so that they are not asked for again.

    Returns:
        the setting's scores, as in result.json

    Raises:
        UserError: the run has no held-out questions, it was tuned with LoRA, its starting projector
            is gone, or the reducer does not fit the model.
    """
    # LoRA changes the weights of the model itself, so the base model is no longer there.
    finished = FinishedRun(run)
    if (run / ADAPTER).is_dir():
        raise UserError(
            f"{run} was tuned with LoRA, so its base model can't be asked; give other finished runs as --runs"
        )

    # This leaves the starting projector in the model.
    comparison.attach("full").detach()

    # Ask in the format that the run was trained with. Answers that are in the folder are read.
    with finished.explained():
        evaluator = Evaluator(
            finished.settings,
            SingleDevice(comparison.family),
            AnswerFiles(folder),
            comparison.processor,
            template_of(finished.meta, source=run),
        )
        (answers,) = evaluator.ask(name, [reducer])
    return answers.row
