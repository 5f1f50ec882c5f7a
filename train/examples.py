"""From data files to tokenized rows, with what was left out reported."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.conversations import BadRow, Row, read_rows
from data.dataset import Example, tokenize
from data.pictures import check_pictures, refuse_if_too_bad
from data.subset import draw, manifest
from train.engine import from_main, is_main, say
from vzip.templates import Template


def _checked_subset(cfg: DictConfig) -> tuple[list[Row], list[BadRow]]:
    rows, bad = read_rows(cfg.data.path)
    refuse_if_too_bad(bad, len(rows) + len(bad))
    drawn = draw(rows, fraction=cfg.data.fraction, seed=cfg.seed)
    good, broken = check_pictures(drawn, Path(cfg.data.image_folder))
    refuse_if_too_bad(broken, len(drawn))
    return good, bad + broken


def training_examples(cfg: DictConfig, template: Template, tokenizer: Any) -> tuple[list[Example], dict[str, Any]]:
    """(examples, manifest) of the run's subset. Rank 0 reads and checks, the others are told.

    Raises:
        UserError: files that are missing or broken, or more than 1 % of rows that can't be used.
    """
    good, bad = from_main(_checked_subset(cfg) if is_main() else None)
    record = manifest(good, bad, fraction=cfg.data.fraction, seed=cfg.seed)
    examples, num_cut = tokenize(good, template, tokenizer, Path(cfg.data.image_folder), max_tokens=cfg.data.max_tokens)
    counts = ", ".join(f"{source} {count:,}" for source, count in record["num_rows_by_source"].items())
    say(f"data: {len(good):,} rows ({counts}), hash {record['hash'][:12]}")
    for row in bad[:10]:
        say(f"  left out: {row.id} ({row.source}): {row.reason}")
    if bad or num_cut:
        say(f"  {len(bad)} rows left out in all (manifest.json), {num_cut} cut at data.max_tokens={cfg.data.max_tokens}")
    return examples, record
