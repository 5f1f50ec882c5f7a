"""Prepare the subset of a run from a data file, with every picture there and whole.

The folder `$VZIP_DATA/prepared/NAME-KEY/` holds manifest.json, checked.jsonl (the pictures and
videos that were looked at), the token arrays, the preflight's report and feature caches. A subset
that was prepared before is only opened.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.conversations import Conversation
from data.examples.bad_examples import check_bad_share, check_lost_sources
from data.examples.hf_folder import HfFolder
from data.examples.media_check import MediaCheck, first_fault
from data.examples.subset import DrawnSubset, draw_subset
from data.examples.table import MAX_STEM, Table, open_table
from data.examples.tokens import Examples, tokens_key, write_tokens
from data.fetch.media_index import MediaIndex
from data.fetch.sources import Source
from data.locks import locked
from data.paths import data_dir
from data.progress import progress
from vzip import UserError
from vzip.files import read_json_object, write_json
from vzip.redact import redacted_values
from vzip.templates.encode import Template

MANIFEST = "manifest.json"
CHECKED = "checked.jsonl"
LOCK = "prepare.lock"
"""Held by the process that writes a subset, or its token arrays."""
VERSION = 4
"""Version of the subsets.

Raise it when a change of the code draws other examples from the same data, or changes the files.
"""

NUM_SHOWN = 10
"""A command prints so many of the examples that were left out."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The settings that say which examples of which data make up a subset.

    Attributes:
        path: a JSON or JSONL file, or a folder of Hugging Face `datasets`.
        image_folder: folder that the examples' paths are relative to.
        fraction, seed, sources, text_examples: see `draw_subset`.
    """

    path: str
    image_folder: str
    fraction: float = 1.0
    seed: int = 0
    sources: tuple[str, ...] | None = None
    text_examples: bool = True


@dataclass(frozen=True)
class Subset:
    """The examples of a selection, with every picture and video there and whole.

    Attributes:
        folder: folder of all files that are made for the subset.
        manifest: see `_manifest`.
        table: all examples of the data.
        image_folder: folder that the examples' paths are relative to.
    """

    folder: Path
    manifest: dict[str, Any]
    table: Table
    image_folder: Path

    @property
    def left_out(self) -> list[str]:
        """Lines about the first `NUM_SHOWN` examples that were left out. The manifest has all."""
        lines = []
        for example in self.manifest["bad_rows"][:NUM_SHOWN]:
            lines.append(f"  left out: {example['id']} ({example['source']}): {example['reason']}")
        return lines

    def conversations(self) -> Iterator[Conversation]:
        """Yield the examples in the order of the manifest."""
        return map(self.table.conversation, self.manifest["positions"])

    def examples(self, template: Template, tokenizer: Any, *, max_tokens: int) -> Examples:
        """Return the examples as token ids and labels, made once per template and tokenizer."""
        # The pictures are part of the key: their sizes are stored with the tokens.
        digest = self.manifest["hash"] + self.manifest["media_hash"]
        key = tokens_key(template, tokenizer, max_tokens=max_tokens, digest=digest)
        target = self.folder / f"tokens-{key}.arrow"
        if not target.is_file():
            with locked(self.folder / LOCK, wait=True):
                # Another process may have written it in the meantime.
                if not target.is_file():
                    self._tokenize(template, tokenizer, target, max_tokens=max_tokens)
        return Examples.open(target, self.image_folder)

    def _tokenize(self, template: Template, tokenizer: Any, target: Path, *, max_tokens: int) -> None:
        """Write the examples as token ids and labels."""
        conversations = progress(
            self.conversations(),
            total=self.manifest["num_rows"],
            title="tokenize",
            unit="example",
        )
        write_tokens(
            conversations,
            template,
            tokenizer,
            target,
            max_tokens=max_tokens,
            sizes=self.sizes(),
        )

    def media_paths(self) -> list[str]:
        """Return the paths of all pictures and videos in the examples, each once."""
        positions = pa.array(self.manifest["positions"], pa.int64())
        paths: list[str] = []
        for column in ("images", "videos"):
            of_examples = self.table.columns[column].take(positions)
            paths += of_examples.combine_chunks().flatten().unique().to_pylist()
        return paths

    @property
    def media_index(self) -> MediaIndex:
        """What is recorded of the pictures and videos."""
        return MediaIndex(self.folder / CHECKED)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return (height, width) of each image by its path in the examples."""
        return self.media_index.sizes()


def _key(selection: Selection, table: Table) -> str:
    """Hash everything that a subset depends on."""
    # The content of the data file counts, but not its path: a moved file needs no new subset.
    settings = asdict(selection)
    settings["path"] = table.sha256
    settings["image_folder"] = str(Path(selection.image_folder).absolute())
    content = json.dumps([VERSION, settings], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _replace_unusable(
    table: Table,
    drawn: DrawnSubset,
    check: Callable[[Sequence[Conversation]], Mapping[str, str]],
) -> tuple[list[int], list[dict[str, Any]]]:
    """Replace each example that can't be used by the next one of its source, if one is left.

    Args:
        table: all examples.
        drawn: the examples to start with.
        check: returns the faults of the examples' pictures and videos, by path.

    Returns:
        (positions of the usable examples, the examples that were left out)
    """
    # The candidates behind the wanted ones replace others, in the order in which they were drawn.
    spare = {}
    for source, candidates in drawn.candidates.items():
        spare[source] = iter(candidates[drawn.wanted[source] :])

    # Each round checks all pending examples together, so that their pictures come in parallel.
    usable = []
    left_out = []
    pending = drawn.positions
    while pending:
        examples = {position: table.conversation(position) for position in pending}
        reasons = check(list(examples.values()))

        # The replacements may be unusable too, so the next round checks them.
        pending = []
        for position, example in examples.items():
            fault = first_fault(example, reasons)
            if fault is None:
                usable.append(position)
                continue

            # A source that has run out of candidates gets smaller.
            other = next(spare[example.source], None)
            if other is not None:
                pending.append(other)
            left_out.append(
                {
                    "id": example.id,
                    "source": example.source,
                    "reason": fault,
                    "replaced": other is not None,
                }
            )

    return drawn.ordered(usable), left_out


def _manifest(
    selection: Selection,
    table: Table,
    drawn: Sequence[int],
    positions: Sequence[int],
    left_out: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Describe a subset. The description is the same on every machine."""
    # Read whole columns: building an object for each example would take seconds.
    sources = table.column("source")
    digests = table.column("digest")
    ids = table.column("id")

    def content_hash(chosen: Sequence[int]) -> str:
        # Sorted, so that the hash does not depend on the order of the data.
        sorted_digests = sorted(digests[position] for position in chosen)
        return hashlib.sha256("".join(sorted_digests).encode()).hexdigest()

    num_by_source = Counter(sources[position] for position in positions)
    return {
        "vzip": version("vzip"),
        "data": {
            "name": Path(selection.path).name,
            "num_rows": len(table),
            "sha256": table.sha256,
        },
        "fraction": selection.fraction,
        "seed": selection.seed,
        "sources": selection.sources,
        "text_rows": selection.text_examples,
        "num_rows": len(positions),
        "num_rows_by_source": dict(sorted(num_by_source.items())),
        "hash": content_hash(positions),
        "drawn_hash": content_hash(drawn),  # before examples were replaced
        "bad_rows": [*map(vars, table.bad_examples()), *left_out],
        "ids": [ids[position] for position in positions],
        "positions": list(positions),
    }


def _read_manifest(path: Path, num_examples: int) -> dict[str, Any]:
    """Read what `_manifest` described. Raises UserError if the file is damaged.

    Args:
        path: the file.
        num_examples: examples of the data, which the positions lie in.
    """
    advice = "delete its folder, and run the same command again, which makes it anew"
    manifest = read_json_object(path, advice=advice)

    # Half a file is no JSON. This is for files that something else has changed.
    texts = (manifest.get("hash"), manifest.get("media_hash"))
    positions = manifest.get("positions")
    if not all(isinstance(text, str) for text in texts) or not isinstance(positions, list):
        raise UserError(f"{path} is damaged (entries are missing); {advice}")
    if not all(type(position) is int and 0 <= position < num_examples for position in positions):
        raise UserError(f"{path} is damaged (it names examples that do not exist); {advice}")
    return manifest


def _make_subset(
    selection: Selection,
    table: Table,
    folder: Path,
    sources: Mapping[str, Sequence[Source]],
    *,
    replace_unreachable: bool,
) -> None:
    """Draw the examples, fetch what is missing, and write the manifest.

    Raises UserError as `prepare` does.
    """
    # The draw needs no picture: only those of the drawn examples are fetched.
    drawn = draw_subset(
        table,
        fraction=selection.fraction,
        seed=selection.seed,
        sources=selection.sources,
        text_examples=selection.text_examples,
    )

    # A folder of Hugging Face `datasets` is the source of its own pictures.
    if Path(selection.path).is_dir():
        inside = HfFolder(selection.path)
        sources = {source: [inside] for source in drawn.candidates}

    # The index remembers what earlier commands looked at, so a killed command resumes.
    media_index = MediaIndex(folder / CHECKED)
    check = MediaCheck(
        Path(selection.image_folder),
        media_index,
        sources,
        replace_unreachable=replace_unreachable,
    )
    positions, left_out = _replace_unusable(table, drawn, check)
    check_lost_sources(drawn, positions, left_out)

    # The token arrays depend on the pictures too, so the manifest has a hash of their content.
    media: list[str] = []
    for example in map(table.conversation, positions):
        media += example.images + example.videos
    manifest = _manifest(selection, table, drawn.positions, positions, left_out)
    manifest["media_hash"] = media_index.content(media)

    # The manifest is written last: it shows that the subset is complete.
    write_json(folder / MANIFEST, redacted_values(manifest))


def prepare(
    selection: Selection,
    *,
    sources: Mapping[str, Sequence[Source]] | None = None,
    replace_unreachable: bool = False,
) -> Subset:
    """Open the subset of a selection. Make it if it is missing.

    The pictures that a killed command fetched are not fetched again.

    Args:
        selection: which examples.
        sources: by the name of the data source, where missing pictures are fetched from. With
            sources, the pictures of an existing subset are looked at again. With None, all pictures
            must be in the folder.
        replace_unreachable: whether to replace an example also if the server of its picture did
            not answer.

    Raises:
        UserError: the data is missing or broken, or too many examples can't be used.
    """
    # Refuse a broken file before any picture is fetched.
    table = open_table(selection.path)
    check_bad_share(table.bad_examples(), len(table))

    # With sources, pictures that went missing since the subset was made are fetched again.
    name = Path(selection.path).stem[:MAX_STEM]
    folder = data_dir() / "prepared" / f"{name}-{_key(selection, table)}"
    if sources is not None or not (folder / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, wait=True):
            # Another process may have made it in the meantime.
            if sources is not None or not (folder / MANIFEST).is_file():
                _make_subset(selection, table, folder, sources or {}, replace_unreachable=replace_unreachable)

    manifest = _read_manifest(folder / MANIFEST, len(table))
    return Subset(folder, manifest, table, Path(selection.image_folder))
