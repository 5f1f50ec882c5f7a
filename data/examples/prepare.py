"""From a data file to the subset of a run: drawn, every picture there and whole, recorded in a manifest.

`$VZIP_DATA/prepared/NAME-KEY/` holds manifest.json, checked.jsonl (the pictures and videos that were looked at), the token
arrays, the preflight's report and feature caches. A subset that is there is only opened.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.conversations import BadExample, Conversation
from data.examples.hf_folder import HfFolder
from data.examples.subset import DrawnSubset, draw_subset
from data.examples.table import Table, open_table
from data.examples.tokens import Examples, tokens_key, write_tokens
from data.fetch.media import MediaIndex, fetch_media
from data.fetch.sources import Source
from data.paths import data_dir, write_json
from data.progress import progress
from vzip import UserError
from vzip.templates.encode import Template

NUM_SHOWN = 10
MANIFEST, CHECKED = "manifest.json", "checked.jsonl"
VERSION = 2
"""Of the subsets: raise it when other rows are drawn of the same data, or their files hold something else."""


MAX_BAD_SHARE = 0.01
"""Training is refused when more than this share of the rows can't be used."""


def check_bad_share(bad: Sequence[BadExample], num_examples: int) -> None:
    """Raises UserError, with counts by source and examples, if more than `MAX_BAD_SHARE` of the rows are bad."""
    if len(bad) <= MAX_BAD_SHARE * num_examples:
        return
    counts = ", ".join(
        f"{source}: {count}" for source, count in sorted(Counter(row.source for row in bad).items())
    )
    examples = "\n".join(f"  {row.id}: {row.reason}" for row in bad[:5])
    raise UserError(
        f"{len(bad)} of {num_examples} rows can't be used ({counts}); at most {MAX_BAD_SHARE:.0%} may be bad. First ones:\n"
        f"{examples}\nRepair them, or take them out of data.path. If all pictures are missing, check data.image_folder; "
        f"`make data` brings those that data.pictures says where to find."
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which rows of which data."""

    path: str
    """A JSON or JSONL file, or a folder of Hugging Face `datasets`."""
    image_folder: str
    fraction: float = 1.0
    seed: int = 0
    sources: tuple[str, ...] | None = None
    text_examples: bool = True


@dataclass(frozen=True)
class Subset:
    """The rows of a selection, with every picture and video there and whole."""

    folder: Path
    manifest: dict[str, Any]
    table: Table
    image_folder: Path

    @property
    def left_out(self) -> list[str]:
        """A line for each of the first `NUM_SHOWN` rows that were left out; the manifest has them all."""
        bad = self.manifest["bad_rows"][:NUM_SHOWN]
        return [f"  left out: {row['id']} ({row['source']}): {row['reason']}" for row in bad]

    def rows(self) -> Iterator[Conversation]:
        """In the order of the manifest."""
        return map(self.table.row, self.manifest["positions"])

    def examples(self, template: Template, tokenizer: Any, *, max_tokens: int) -> Examples:
        """The rows as token ids and labels, made once for a template and a tokenizer."""
        digest = self.manifest["hash"] + self.manifest["media_hash"]
        key = tokens_key(template, tokenizer, max_tokens=max_tokens, digest=digest)
        target = self.folder / f"tokens-{key}.arrow"
        if not target.is_file():
            rows = progress(self.rows(), total=self.manifest["num_rows"], title="tokenize", unit="row")
            write_tokens(rows, template, tokenizer, target, max_tokens=max_tokens, sizes=self.sizes())
        return Examples.open(target, self.image_folder)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of each image by its path in the rows."""
        return MediaIndex(self.folder / CHECKED).sizes()


def _key(selection: Selection, table: Table) -> str:
    where = {"path": table.sha256, "image_folder": str(Path(selection.image_folder).absolute())}
    what = [VERSION, asdict(selection) | where]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _fault(row: Conversation, faults: Mapping[str, str]) -> str | None:
    """What is wrong with the first of a row's pictures and videos that has a fault."""
    return next((f"{path}: {faults[path]}" for path in row.images + row.videos if path in faults), None)


def _replace_unusable(
    table: Table, chosen: DrawnSubset, check: Callable[[Sequence[Conversation]], Mapping[str, str]]
) -> tuple[list[int], list[Any]]:
    """(positions, what was left out): every row that can't be used gives its place to the next one of its source."""
    good, left_out, pending = [], [], chosen.positions
    spare = {source: iter(rows[chosen.wanted[source] :]) for source, rows in chosen.candidates.items()}
    while pending:
        rows = {position: table.row(position) for position in pending}
        faults, pending = check(list(rows.values())), []
        for position, row in rows.items():
            fault = _fault(row, faults)
            if fault is None:
                good.append(position)
                continue
            other = next(spare[row.source], None)
            left_out.append(
                {"id": row.id, "source": row.source, "reason": fault, "replaced": other is not None}
            )
            pending += [] if other is None else [other]
    return chosen.ordered(good), left_out


def _manifest(
    selection: Selection,
    table: Table,
    drawn: Sequence[int],
    positions: Sequence[int],
    left_out: Sequence[Any],
) -> dict[str, Any]:
    """What is recorded of a subset; the same on every machine."""
    sources, digests, ids = (table.column(name) for name in ("source", "digest", "id"))

    def content(of: Sequence[int]) -> str:
        return hashlib.sha256("".join(sorted(digests[position] for position in of)).encode()).hexdigest()

    return {
        "vzip": version("vzip"),
        "data": {"name": Path(selection.path).name, "num_rows": len(table), "sha256": table.sha256},
        "fraction": selection.fraction,
        "seed": selection.seed,
        "sources": selection.sources,
        "text_rows": selection.text_examples,
        "num_rows": len(positions),
        "num_rows_by_source": dict(sorted(Counter(sources[position] for position in positions).items())),
        "hash": content(positions),
        "drawn_hash": content(drawn),  # before rows were replaced
        "bad_rows": [vars(row) for row in table.bad_examples()] + list(left_out),
        "ids": [ids[position] for position in positions],
        "positions": list(positions),
    }


def _check_lost_sources(chosen: DrawnSubset, positions: Sequence[int], left_out: Sequence[Any]) -> None:
    """Raises UserError for a source of which most rows can't be used: its place is a wrong one, or its server."""
    good = set(positions)
    for source, wanted in chosen.wanted.items():
        found = len(good.intersection(chosen.candidates[source]))
        if 2 * found < wanted and wanted - found > MAX_BAD_SHARE * chosen.num_wanted:
            reasons = [f"  {row['id']}: {row['reason']}" for row in left_out if row["source"] == source][:5]
            raise UserError(
                f"of {source} only {found:,} of {wanted:,} rows can be used; check data.pictures.{source} and "
                f"data.image_folder, or leave the source out with data.sources. First ones:\n"
                + "\n".join(reasons)
            )


class _Check:
    """Looks at the pictures and videos of rows, and brings those that are missing from the source's places."""

    def __init__(
        self,
        folder: Path,
        media_index: MediaIndex,
        places: Mapping[str, Sequence[Source]],
        *,
        replace_unreachable: bool,
    ) -> None:
        self.folder, self.media_index, self.places, self.replace_unreachable = (
            folder,
            media_index,
            places,
            replace_unreachable,
        )
        self.bad: list[BadExample] = []
        self.num_examples = 0

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, str]:
        """What is wrong, by path. Raises UserError where too much is, or servers did not answer."""
        media = [
            (kind, path, row.source) for row in rows for kind, paths in row.media.items() for path in paths
        ]
        faults = fetch_media(media, self.folder, places=self.places, media_index=self.media_index)
        reasons = {path: fault.reason for path, fault in faults.items()}
        passing = [path for path, fault in faults.items() if not fault.final]
        if passing and not self.replace_unreachable:
            raise UserError(
                f"{len(passing)} pictures could not be had now. Run the same command again, it resumes; or, if they will "
                f"not come back, data.replace_unreachable=true puts other rows of their source there. First ones:\n"
                + "\n".join(f"  {path}: {reasons[path]}" for path in passing[:5])
            )
        bad = [
            (row, fault)
            for row in rows
            if not self.places.get(row.source) and (fault := _fault(row, reasons))
        ]
        self.bad += [BadExample(row.id, row.source, fault) for row, fault in bad]
        self.num_examples = self.num_examples or len(
            rows
        )  # later calls are of rows that replace some of the first
        check_bad_share(self.bad, self.num_examples)
        return reasons


def prepare(
    selection: Selection,
    *,
    places: Mapping[str, Sequence[Source]] | None = None,
    replace_unreachable: bool = False,
) -> Subset:
    """The subset of a selection, made where it is not there yet; what a killed command did is not done again.

    Args:
        selection: which rows.
        places: where missing pictures are taken from, by source; then they are also looked for if the subset is there. Without,
            all must be in the folder.
        replace_unreachable: whether other rows also replace those whose pictures' servers did not answer.

    Raises:
        UserError: data that is missing or broken, or too many rows that can't be used.
    """
    table, image_folder = open_table(selection.path), Path(selection.image_folder)
    check_bad_share(table.bad_examples(), len(table))
    folder = data_dir() / "prepared" / f"{Path(selection.path).stem}-{_key(selection, table)}"
    if places is not None or not (folder / MANIFEST).is_file():
        chosen = draw_subset(
            table,
            fraction=selection.fraction,
            seed=selection.seed,
            sources=selection.sources,
            text_examples=selection.text_examples,
        )
        if Path(selection.path).is_dir():
            inside = HfFolder(selection.path)
            places = {source: [inside] for source in chosen.candidates}
        folder.mkdir(parents=True, exist_ok=True)
        media_index = MediaIndex(folder / CHECKED)
        check = _Check(image_folder, media_index, places or {}, replace_unreachable=replace_unreachable)
        positions, left_out = _replace_unusable(table, chosen, check)
        _check_lost_sources(chosen, positions, left_out)
        media = media_index.content(
            path for row in map(table.row, positions) for path in row.images + row.videos
        )
        manifest = _manifest(selection, table, chosen.positions, positions, left_out)
        write_json(folder / MANIFEST, manifest | {"media_hash": media})
    return Subset(folder, json.loads((folder / MANIFEST).read_text()), table, image_folder)
