"""Read the folder of a run: its settings, what it ran on, its metrics, answers and scores.

Anybody may have written the folder. Its files are plain data: they are checked before they are
used, nothing is built from what they name, and no variable of the environment is put into them.
This module imports no torch, so that `make report` starts at once.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.settings import Config
from vzip.errors import UserError
from vzip.files import read_json, read_json_object
from vzip.runs.schema import (
    COUNT,
    FLAG,
    LIST,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    WHOLE,
    check_entries,
)

SETTINGS = "config.yaml"

GROUPS = ("model", "reducer", "data", "deepspeed", "tune", "track")
"""Groups of settings without a default. An older run may lack one."""

_RESTORE = "restore the file, or leave the folder out"

_ENV = {
    "date": TEXT,
    "commit": TEXT.or_null(),
    "modified_files": TEXTS,
    "command": TEXTS,
    "packages": OBJECT,
    "packages.torch": TEXT,
    "hardware": OBJECT,
    "hardware.device": TEXT,
    "hardware.num_cpus": COUNT.or_null(),
    "hardware.world_size": COUNT,
}
_RESULT = {"rows": LIST}
_RESULT_OPTIONAL = {"num_steps": WHOLE, "manifest": TEXT, "seed": WHOLE}
_ROW = {
    "name": TEXT,
    "num_visual_tokens": NUMBER,
    "num_questions": COUNT,
    "metrics": NUMBERS,
    "metrics.all": NUMBER,
}
_ANSWER = {
    "num_visual_tokens": NUMBER,
    "image": TEXT,
    "question": TEXT,
    "expected": TEXT,
    "answer": TEXT,
    "kind": TEXT,
    "correct": FLAG,
}
"""Entries of the files, with their kinds."""


class _PlainLoader(yaml.SafeLoader):
    """A reader of plain values that refuses references (`*name`).

    A few lines with references can stand for billions of values, and no run writes them.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            reference = self.peek_event()
            raise yaml.MarkedYAMLError(problem="a reference", problem_mark=reference.start_mark)
        return super().compose_node(parent, index)


def _values(settings: Any) -> Iterator[Any]:
    """Yield all values in nested groups and lists."""
    remaining = [settings]
    while remaining:
        value = remaining.pop()
        yield value
        if isinstance(value, dict):
            remaining += value.values()
        elif isinstance(value, list):
            remaining += value


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read the answers of one setting from its file, `answers_SETTING.json`.

    Raises:
        UserError: the file is damaged.
    """
    advice = "restore the file, or delete it: the same command then asks the questions again"
    answers = read_json(path, advice=advice)
    if not isinstance(answers, list) or not answers:
        raise UserError(f"{path} is damaged (it holds no answers); {advice}")
    for number, answer in enumerate(answers):
        check_entries(answer, _ANSWER, source=f"{path}, answer {number}", advice=advice)
    return answers


class FinishedRun:
    """The files of a run folder, each read when it is first used.

    A run that is still training has no scores yet: see `is_finished`. A folder may also hold only a
    projector, without settings: see `has_settings`. Reading a file that is missing or damaged raises
    UserError.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"FinishedRun({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @property
    def has_settings(self) -> bool:
        """Whether there is a config.yaml. A projector that was copied without its run has none."""
        return (self.path / SETTINGS).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether there is a result.json, which a run writes last."""
        return (self.path / "result.json").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings in config.yaml, as plain data."""
        path = self.path / SETTINGS
        text = self._text(SETTINGS, "the settings of the run are not known")
        try:
            settings = yaml.load(text, Loader=_PlainLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path} can't be read: {error}; {_RESTORE}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{path} holds no settings; give a folder that a run wrote")

        return settings

    @cached_property
    def settings(self) -> DictConfig:
        """The same settings with their types and defaults, to be read as `settings.data.path`.

        Raises UserError if a setting has a value that no run can have.
        """
        # A run writes plain values. A reference would be replaced by whatever it names here, such
        # as a variable of this user's environment.
        path = self.path / SETTINGS
        for value in _values(self.config):
            if isinstance(value, str) and "${" in value:
                raise UserError(f"{path} refers to {value[:100]}, and a run writes plain values; {_RESTORE}")

        # Older runs may lack settings, or have others that are gone by now.
        settings = OmegaConf.merge(OmegaConf.structured(Config), {name: {} for name in GROUPS})
        assert isinstance(settings, DictConfig)
        for group in (settings, *settings.values()):
            if isinstance(group, DictConfig):
                OmegaConf.set_struct(group, False)
        try:
            settings.merge_with(self.config)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            reason = ", ".join(line.strip() for line in str(error).splitlines()[:2])
            raise UserError(f"{path} holds a wrong setting: {reason}; {_RESTORE}") from error
        return settings

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise UserError if the block reads a setting that the run's config.yaml lacks."""
        try:
            yield
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path / SETTINGS} lacks a setting: {reason}; {_RESTORE}") from error

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting such as "data.path", or the default if the run has no such setting."""
        # Go down one group per part of the name. An older run may lack a group.
        value: Any = self.config if self.has_settings else {}
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                return default
            value = value[key]
        return value

    @cached_property
    def meta(self) -> dict[str, Any]:
        """meta.json: what the projector belongs to, and how it was tuned.

        Raises UserError if the run has no scores yet.
        """
        # Imported here, because it imports torch.
        from vzip.runs.meta import read_finished

        return read_finished(self.path)

    @cached_property
    def env(self) -> dict[str, Any]:
        """env.json: date, commit, command, versions and hardware."""
        return self._object("env.json", {}, optional=_ENV)

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json: scores ("rows"), number of steps, hash of the data, seed."""
        result = self._object("result.json", _RESULT, optional=_RESULT_OPTIONAL)
        path = self.path / "result.json"
        for row in result["rows"]:
            check_entries(row, _ROW, source=f"{path}, a row", advice=_RESTORE)

            # All settings answer the same questions, so they have scores of the same kinds.
            if row["metrics"].keys() != result["rows"][0]["metrics"].keys():
                raise UserError(f"{path}: the rows have metrics of different kinds; {_RESTORE}")
        return result

    @property
    def scores(self) -> list[dict[str, Any]]:
        """The scores of each setting. Empty before the run has finished, or without questions."""
        return list(self.result["rows"]) if self.is_finished else []

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """One entry per step.

        A last line that is not complete, because the run is writing it or was killed, is left out.
        """
        lines = self._text("metrics.jsonl", "it was stopped before it trained").splitlines(keepends=True)
        return [self._step(number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]

    def _step(self, number: int, line: str) -> dict[str, float]:
        """Read a line of metrics.jsonl. `number` counts from 1."""
        source = f"{self.path / 'metrics.jsonl'}, line {number}"
        try:
            step = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source} is damaged ({error}); {_RESTORE}") from error
        if not NUMBERS.accepts(step):
            raise UserError(f"{source} is not {NUMBERS.name}; {_RESTORE}")
        check_entries(step, {"step": NUMBER}, source=source, advice=_RESTORE)
        return dict(step)

    def answers(self, setting: str) -> list[dict[str, Any]] | None:
        """Read the answers in a setting such as "full". None if it was not asked."""
        # A run asks no baselines with evaluate.baselines=false, so a file may be missing.
        path = self.path / f"answers_{setting}.json"
        return read_answers(path) if path.is_file() else None

    def own_folder(self, name: str) -> Path:
        """Return a folder of the run that a command writes into.

        Raises:
            UserError: it, or a folder in it, is a link out of the run, which may have come with a
                stranger's folder.
        """
        folder = self.path / name
        for path in (folder, *folder.glob("*")):
            leads_out = not path.resolve().is_relative_to(self.path.resolve())
            if leads_out and not path.is_file():
                raise UserError(f"{path} is a link out of the run's folder; give another folder as --out")
        return folder

    def _text(self, name: str, consequence: str) -> str:
        """Read a file. `consequence` says what is wrong if it is missing."""
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{self.path} has no {name}, so {consequence}; give a folder that a run wrote")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} can't be read: {error}; {_RESTORE}") from error

    def _object(self, name: str, required: dict[str, Any], *, optional: dict[str, Any]) -> dict[str, Any]:
        """Read a JSON file that holds an object with these entries."""
        path = self.path / name
        if not path.is_file():
            raise UserError(
                f"{self.path} has no {name}, so it is not a finished run; give a folder that a run wrote"
            )
        content = read_json_object(path, advice=_RESTORE)
        check_entries(content, required, optional=optional, source=path, advice=_RESTORE)
        return content


def find_runs(folder: Path) -> list[FinishedRun]:
    """List the runs in a folder of runs, finished or not, by name."""
    return [FinishedRun(path.parent) for path in sorted(folder.glob(f"*/{SETTINGS}"))]
