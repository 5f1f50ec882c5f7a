"""Folders of Hugging Face `datasets` with the pictures inside: their rows in LLaVA's form, and their pictures.

A folder is what `save_to_disk` writes, or one that `load_dataset` reads (parquet, Arrow, JSON). Its columns: `conversations` as
in LLaVA's JSON, `image` or `images` with pictures, and, where there are, `id`, `source`, `type`.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data.download import Gone
from vzip import UserError

COLUMNS = ("image", "images")
"""That may hold pictures: one, or a list of them."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a data set in a form that `datasets` reads."""
    return path.is_dir() and (
        (path / "state.json").is_file()
        or (path / "dataset_dict.json").is_file()
        or any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow", "jsonl"))
    )


def _pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is stored of a row's pictures: bytes, or a path."""
    values = [row.get(name) or [] for name in COLUMNS]
    return [picture for value in values for picture in (value if isinstance(value, list) else [value])]


class HfFolder:
    """The data set of a folder, its split "train" where it has several.

    Raises:
        UserError: a folder that `datasets` can't read, or without the columns above.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def rows(self) -> Any:
        """A `datasets.Dataset` whose pictures stay as they are stored."""
        import datasets  # seconds, which only such folders cost

        saved = any((self.path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        load = datasets.load_from_disk if saved else datasets.load_dataset
        try:
            found = load(str(self.path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.path={self.path}: `datasets` can't read this folder: {error}") from error
        if isinstance(found, dict):
            if "train" not in found:
                raise UserError(f"data.path={self.path} has the splits {', '.join(found)}, but no 'train'; give one split")
            found = found["train"]
        if "conversations" not in found.column_names:
            raise UserError(f"data.path={self.path} has no column 'conversations', only {', '.join(found.column_names)}")
        for name in set(COLUMNS) & set(found.column_names):
            many = isinstance(found.features[name], datasets.List)
            picture = datasets.Image(decode=False)
            found = found.cast_column(name, datasets.List(picture) if many else picture)
        return found

    def entries(self) -> Iterator[dict[str, Any]]:
        """The rows in LLaVA's form: a picture's path says in which row it is, and its number there."""
        for position, row in enumerate(self.rows):
            entry = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
            if pictures := _pictures(row):
                entry["image"] = [f"{self.path.name}/{position:07}-{number}" for number in range(len(pictures))]
            yield entry

    def read(self, path: str) -> bytes:
        """The bytes of the picture with a path that `entries` gave."""
        position, number = map(int, Path(path).name.split("-"))
        picture = _pictures(self.rows[position])[number]
        if picture.get("bytes") is not None:
            return bytes(picture["bytes"])
        try:
            return (self.path / picture["path"]).read_bytes()
        except OSError as error:
            raise Gone(f"{self.path}: the picture of row {position} is not inside, and can't be read: {error}") from error
