"""Folders of Hugging Face `datasets` with the pictures inside, as data in LLaVA's form.

A folder is what `save_to_disk` writes, or one that `load_dataset` reads (parquet, Arrow, JSON). Its
columns: `conversations` as in LLaVA's JSON, `image` or `images` with pictures, and optionally `id`,
`source` and `type`.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data.fetch.http import NotFoundError
from data.paths import data_dir
from vzip.errors import UserError, check_package

PICTURE_COLUMNS = ("image", "images")
"""Columns that hold one picture, or a list of pictures."""
OTHER_COLUMNS = ("id", "source", "type", "conversations")
"""The other columns that are read."""
SAVED = ("state.json", "dataset_dict.json")
"""Files of which `save_to_disk` writes one."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder holds a data set in a form that `datasets` reads."""
    if not path.is_dir():
        return False
    if any((path / name).is_file() for name in SAVED):
        return True
    return any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow", "jsonl"))


def _stored_pictures(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures in a row of the dataset, each as {"bytes"} or {"path"}."""
    pictures = []
    for name in PICTURE_COLUMNS:
        value = row.get(name) or []
        for picture in value if isinstance(value, list) else [value]:
            pictures.append({"path": picture} if isinstance(picture, str) else picture)
    return pictures


class HfFolder:
    """The data set in a folder, its split "train" if it has several.

    A source of its pictures, see `Source`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the examples in LLaVA's form.

        The path of a picture holds where it is in the folder (row and number there), and a hash of
        its bytes. Raises UserError as `dataset` does.
        """
        for position in range(len(self.dataset)):
            row = self._row(position)
            entry = {"id": str(position)}
            for name in OTHER_COLUMNS:
                if row.get(name) is not None:
                    entry[name] = row[name]

            # The hash keeps pictures of another folder with the same name apart.
            paths = []
            for number, picture in enumerate(_stored_pictures(row)):
                paths.append(f"{self.path.name}/{position:07}-{number}-{self._digest(picture)}")
            if paths:
                entry["image"] = paths
            yield entry

    def read(self, path: str) -> bytes:
        """The bytes of the picture whose path `entries` gave."""
        # The inverse of the name that `entries` makes.
        position, number, _ = Path(path).name.split("-")
        pictures = _stored_pictures(self._row(int(position)))
        return self._bytes(pictures[int(number)])

    @cached_property
    def dataset(self) -> Any:
        """A `datasets.Dataset`, as Arrow.

        Raises UserError if `datasets` can't read the folder, or a column is missing.
        """
        # The import takes seconds, which only such folders cost.
        check_package("datasets", extra="datasets", purpose=f"reading {self.path}")
        import datasets

        # The two forms have a loader each; only the second one needs a place for converted files.
        try:
            if any((self.path / name).is_file() for name in SAVED):
                dataset = datasets.load_from_disk(str(self.path))
            else:
                cache = str(data_dir() / "datasets")
                dataset = datasets.load_dataset(str(self.path), cache_dir=cache)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.path={self.path}: `datasets` can't read this folder: {error}") from error

        # A dict holds several splits, of which one is for training.
        if isinstance(dataset, dict):
            if "train" not in dataset:
                splits = ", ".join(dataset)
                raise UserError(
                    f"data.path={self.path} has the splits {splits}, but no 'train'; give one split"
                )
            dataset = dataset["train"]

        if "conversations" not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise UserError(f"data.path={self.path} has no column 'conversations', only {columns}")

        names = [name for name in PICTURE_COLUMNS + OTHER_COLUMNS if name in dataset.column_names]
        # Pictures stay as they are stored: nobody asks `datasets` to decode them.
        return dataset.select_columns(names).with_format("arrow")

    def _row(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self.dataset[position : position + 1].to_pylist()[0]
        return row

    def _digest(self, picture: dict[str, Any]) -> str:
        try:
            return hashlib.sha256(self._bytes(picture)).hexdigest()[:12]
        except NotFoundError:
            return "gone"

    def _bytes(self, picture: dict[str, Any]) -> bytes:
        if picture.get("bytes") is not None:
            return bytes(picture["bytes"])

        try:
            return (self.path / (picture.get("path") or "")).read_bytes()
        except OSError as error:
            raise NotFoundError(
                f"{self.path}: a picture is not inside, and can't be read: {error}"
            ) from error
