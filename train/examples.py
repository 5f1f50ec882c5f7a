"""A run's data: prepared once on each host, opened by every rank, with what was left out reported."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from data.batches.collate import Collator
from data.cache.features import cache_settings, media_of_examples, open_cache
from data.conversations import Conversation
from data.examples.prepare import Subset, prepare
from data.examples.tokens import Examples
from train.config import asks_questions, held_out, selection
from train.ranks import all_gather_list, main_first, print_rank0
from vzip import UserError
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates.encode import Template


def _report(subset: Subset) -> None:
    """Say what was left out, on rank 0. Raises UserError if the hosts hold different data."""
    manifest = subset.manifest
    if len(set(all_gather_list([manifest["hash"] + manifest["media_hash"]]))) > 1:
        raise UserError(
            f"the hosts' copies of {manifest['data']['name']} or its pictures differ; make them the same"
        )
    for line in subset.left_out:
        print_rank0(line)
    if manifest["bad_rows"]:
        replaced = sum(row.get("replaced", False) for row in manifest["bad_rows"])
        print_rank0(
            f"  {len(manifest['bad_rows'])} rows left out in all, {replaced} replaced; `make data` looks at them again"
        )


def training_subset(cfg: DictConfig) -> Subset:
    """The rows that the run is tuned on. The held-out ones are looked at too: mistakes in the data come before the model.

    Raises UserError as `prepare_tiny` does.
    """
    subset = main_first(lambda: prepare(selection(cfg)))
    _report(subset)
    if asks_questions(cfg):
        _report(main_first(lambda: prepare(held_out(cfg))))
    return subset


def held_out_conversations(cfg: DictConfig) -> list[Conversation]:
    """The rows of `data.held_out`."""
    return list(prepare(held_out(cfg)).rows())


def training_collators(
    cfg: DictConfig,
    processor: Any,
    family: Family,
    reducers: Sequence[Reducer],
    examples: Examples,
    *,
    base_fingerprint: str,
) -> list[Collator]:
    """The collators of the run's micro batches, one a reducer: of files, or, with `data.cache`, of features that `make cache`
    made.

    With these the towers' memory is freed, unless questions will be asked.
    Raises UserError for a kind of media that the model does not take, and for a cache that does not fit.
    """
    num_frames, media = cfg.model.get("num_frames", 1), None
    if cfg.data.cache:
        (reducer,) = reducers  # `train.checks` refuses several
        settings = cache_settings(
            family,
            reducer,
            processor,
            base_fingerprint=base_fingerprint,
            rows=media_of_examples(examples),
            num_frames=num_frames,
        )
        media = open_cache(examples.path.parent, settings)
        if not asks_questions(cfg):
            family.drop_towers()
    return [
        Collator(processor, family, reducer, kinds=examples.kinds, num_frames=num_frames, media=media)
        for reducer in reducers
    ]


def training_examples(cfg: DictConfig, subset: Subset, template: Template, tokenizer: Any) -> Examples:
    """The subset as token ids and labels. Raises UserError for rows that the template or the tokenizer does not take."""
    manifest = subset.manifest
    examples = main_first(lambda: subset.examples(template, tokenizer, max_tokens=cfg.data.max_tokens))
    counts = ", ".join(f"{source} {count:,}" for source, count in manifest["num_rows_by_source"].items())
    print_rank0(f"data: {len(examples):,} rows ({counts}), hash {manifest['hash'][:12]}")
    if num_cut := int((examples.column("num_whole_tokens") > cfg.data.max_tokens).sum()):
        print_rank0(f"  {num_cut} rows cut at data.max_tokens={cfg.data.max_tokens}")
    if num_mute := manifest["num_rows"] - len(examples):
        print_rank0(f"  {num_mute} rows left out, of which that cut leaves no answer")
    return examples
