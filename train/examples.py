"""From data files to tokenized rows, with what was left out reported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.conversations import BadRow, Row, read_rows
from data.dataset import Collator
from data.pictures import check_pictures, refuse_if_too_bad
from data.subset import draw, manifest
from data.tokens import Example, kinds_of, tokenize
from train.engine import from_main, is_main, say
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates import Template


def _checked(path: str, folder: Path, *, fraction: float, seed: int) -> tuple[list[Row], list[BadRow]]:
    rows, bad = read_rows(path)
    refuse_if_too_bad(bad, len(rows) + len(bad))
    drawn = draw(rows, fraction=fraction, seed=seed)
    good, broken = check_pictures(drawn, folder)
    refuse_if_too_bad(broken, len(drawn))
    return good, bad + broken


def usable_rows(path: str, folder: Path, *, fraction: float, seed: int) -> tuple[list[Row], list[BadRow]]:
    """The rows drawn from a data file, and those left out, which are listed. Rank 0 reads and checks, the others are told.

    Raises:
        UserError: files that are missing or broken, or more than 1 % of rows that can't be used.
    """
    good, bad = from_main(_checked(path, folder, fraction=fraction, seed=seed) if is_main() else None)
    for row in bad[:10]:
        say(f"  left out: {row.id} ({row.source}): {row.reason}")
    if bad:
        say(f"  {len(bad)} rows of {path} left out in all")
    return good, bad


def make_collator(cfg: DictConfig, processor: Any, family: Family, reducer: Reducer, examples: Sequence[Example]) -> Collator:
    """The collator for these examples under a reducer. Raises UserError for media that the model does not take."""
    return Collator(processor, family, reducer, kinds=kinds_of(examples), num_frames=cfg.model.get("num_frames", 1))


def training_examples(cfg: DictConfig, template: Template, tokenizer: Any) -> tuple[list[Example], dict[str, Any]]:
    """(examples, manifest) of the run's subset. Raises UserError as `usable_rows` does."""
    folder = Path(cfg.data.image_folder)
    good, bad = usable_rows(cfg.data.path, folder, fraction=cfg.data.fraction, seed=cfg.seed)
    record = manifest(good, bad, fraction=cfg.data.fraction, seed=cfg.seed)
    examples, num_cut = tokenize(good, template, tokenizer, folder, max_tokens=cfg.data.max_tokens)
    counts = ", ".join(f"{source} {count:,}" for source, count in record["num_rows_by_source"].items())
    say(f"data: {len(good):,} rows ({counts}), hash {record['hash'][:12]}")
    if num_cut:
        say(f"  {num_cut} rows cut at data.max_tokens={cfg.data.max_tokens}")
    return examples, record
