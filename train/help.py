"""Describe all settings, for `python train/tune.py --help` and for documentation.

The descriptions are the strings below the fields in train/settings.py. Python does not keep them, so
they are read from the source.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from train.settings import Config, LoraSettings, ReducerSettings

WIDTH = 100
INDENT = 30
"""Columns of the help text, and where the descriptions begin."""
PARTS = {"reducer": ReducerSettings, "tune.lora": LoraSettings}
"""Settings that are groups, though the schema leaves them open."""


@dataclass(frozen=True)
class SettingDescription:
    """A setting, with its full name, such as "optim.lr"."""

    name: str
    text: str


def _texts(schema: type) -> dict[str, str]:
    """The descriptions of a dataclass's fields, by their names: the strings below them in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    name = ""
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            texts[name] = " ".join(str(statement.value.value).split())
    return texts


def describe_settings(schema: Any = Config, prefix: str = "") -> Iterator[SettingDescription]:
    """All settings in the order of the schema, those of a group one after the other."""
    texts = _texts(schema)
    for field in fields(schema):
        name = f"{prefix}{field.name}"
        group = field.type if is_dataclass(field.type) else PARTS.get(name)
        if group is None or name in PARTS:
            yield SettingDescription(name, texts[field.name])
        if group is not None:
            yield from describe_settings(group, f"{name}.")


def settings_help() -> str:
    """The settings as a text of two columns."""
    indent = " " * INDENT
    lines = []
    for setting in describe_settings():
        text = textwrap.fill(setting.text, WIDTH, initial_indent=indent, subsequent_indent=indent)
        name = f"{setting.name} ".ljust(INDENT)
        lines.append(name + text[len(indent) :])
    return "\n".join(lines)
