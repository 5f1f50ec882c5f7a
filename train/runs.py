"""Read the folder of a run: its settings, what it ran on, its metrics, answers and scores.

The settings are plain YAML data: nothing is built from what a run's files name, and a folder from
somebody else is safe to read. This module imports no torch, so that `make report` starts at once.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vzip.errors import UserError

SETTINGS = "config.yaml"


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
        try:
            settings = yaml.safe_load(self._text(SETTINGS, "the settings of the run are not known"))
        except yaml.YAMLError as error:
            raise UserError(f"{self.path / SETTINGS} can't be read: {error}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{self.path / SETTINGS} holds no settings; give a folder that a run wrote")
        return settings

    @property
    def settings(self) -> DictConfig:
        """The same settings, to be read as `settings.data.path`."""
        return OmegaConf.create(self.config)

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
        return self._object("env.json")

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json: scores ("rows"), number of steps, hash of the data, seed."""
        return self._object("result.json")

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
        return [self._parsed("metrics.jsonl", line) for line in lines if line.endswith("\n")]

    def answers(self, setting: str) -> list[dict[str, Any]] | None:
        """Read the answers in a setting such as "full". None if it was not asked."""
        # A run asks no baselines with evaluate.baselines=false, so a file may be missing.
        name = f"answers_{setting}.json"
        if not (self.path / name).is_file():
            return None
        answers: list[dict[str, Any]] = self._parsed(name, self._text(name, "it was not asked"))
        return answers

    def _text(self, name: str, consequence: str) -> str:
        """Read a file. `consequence` says what is wrong if it is missing."""
        # Say what is missing, and why that matters to the user.
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{self.path} has no {name}, so {consequence}; give a folder that a run wrote")
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} can't be read: {error}") from error

    def _parsed(self, name: str, text: str) -> Any:
        """Parse the text of a JSON file of the run."""
        # A copy of a run may be damaged, and a traceback would not name the file.
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path / name} is not valid JSON: {error}") from error

    def _object(self, name: str) -> dict[str, Any]:
        """Read a JSON file that holds an object."""
        value = self._parsed(name, self._text(name, "it is not a finished run"))
        if not isinstance(value, dict):
            raise UserError(f"{self.path / name} holds no JSON object; it is not what a run wrote")
        return value


def find_runs(folder: Path) -> list[FinishedRun]:
    """List the runs in a folder of runs, finished or not, by name."""
    return [FinishedRun(path.parent) for path in sorted(folder.glob(f"*/{SETTINGS}"))]
