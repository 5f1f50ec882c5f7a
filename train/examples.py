"""The data of a run: prepared once on each host, then opened by every rank."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from data.batches.collate import Collator
from data.cache.features import cache_settings, name_of_examples, open_cache
from data.conversations import Conversation
from data.examples.prepare import Subset, prepare
from data.examples.tokens import Examples
from data.examples.unchanged import check_media_unchanged
from train.config import asks_questions, held_out, selection
from train.ranks import all_gather_list, main_first, print_rank0
from vzip import UserError
from vzip.families import Family
from vzip.reducers import Reducer
from vzip.templates.encode import Template


def training_subset(cfg: DictConfig) -> Subset:
    """Prepare the examples that the run is tuned on. Called by all ranks.

    The held-out conversations are prepared too, to find mistakes before the model is loaded.

    Raises:
        UserError: the data can't be prepared, the hosts hold different data, or pictures have changed
            since the data was prepared.
    """
    # One rank of a host prepares, and the others open what it wrote.
    subset = main_first(lambda: prepare(selection(cfg)))
    _report_left_out(subset)

    # A cache holds the features of pictures, which need not be there any more.
    if not cfg.data.cache:
        check_media_unchanged(subset)

    if asks_questions(cfg):
        held_out_subset = main_first(lambda: prepare(held_out(cfg)))
        _report_left_out(held_out_subset)
        check_media_unchanged(held_out_subset)
    return subset


def _report_left_out(subset: Subset) -> None:
    """Print which examples were left out. Raises UserError if the hosts hold different data."""
    # Each host prepares its own copy of the data. Different copies would train a mixture of runs.
    manifest = subset.manifest
    hashes = all_gather_list([manifest["hash"] + manifest["media_hash"]])
    if len(set(hashes)) > 1:
        raise UserError(
            f"the hosts' copies of {manifest['data']['name']} or its pictures differ; make them the same"
        )

    # Print the first examples that were left out by name, then the number of all.
    for line in subset.left_out:
        print_rank0(line)

    bad_examples = manifest["bad_rows"]
    if bad_examples:
        num_replaced = sum(bad.get("replaced", False) for bad in bad_examples)
        print_rank0(
            f"  {len(bad_examples)} examples left out in all, {num_replaced} replaced; "
            f"`make data` checks them again"
        )


def held_out_conversations(cfg: DictConfig) -> list[Conversation]:
    """Return the conversations of `data.held_out`."""
    return list(prepare(held_out(cfg)).conversations())


def training_examples(cfg: DictConfig, subset: Subset, template: Template, tokenizer: Any) -> Examples:
    """Tokenize the subset, or open the tokens of an earlier run. Called by all ranks.

    Raises:
        UserError: an example that the template or the tokenizer does not accept.
    """
    # One rank of each host tokenizes and writes the file, which the others open.
    max_tokens = cfg.data.max_tokens
    examples = main_first(lambda: subset.examples(template, tokenizer, max_tokens=max_tokens))

    # Say what the run learns from, and what it does not.
    manifest = subset.manifest
    sources = [f"{source} {count:,}" for source, count in manifest["num_rows_by_source"].items()]
    digest = manifest["hash"][:12]
    print_rank0(f"data: {len(examples):,} examples ({', '.join(sources)}), hash {digest}")

    num_cut = int((examples.column("num_whole_tokens") > max_tokens).sum())
    if num_cut:
        print_rank0(f"  {num_cut} examples cut at data.max_tokens={max_tokens}")

    # A cut may remove all answers of an example, and LLaVA's trainer puts no loss on some. They
    # have nothing to learn from.
    num_without_answer = manifest["num_rows"] - len(examples)
    if num_without_answer:
        print_rank0(f"  {num_without_answer} examples left out: no answer has a label")
    return examples


def training_collators(
    cfg: DictConfig,
    processor: Any,
    family: Family,
    reducers: Sequence[Reducer],
    examples: Examples,
    *,
    base_fingerprint: str,
) -> list[Collator]:
    """Build one collator per reducer, with pictures from files or from the feature cache.

    Args:
        cfg: the run's settings.
        processor: the model's processor.
        family: the adapter around the model.
        reducers: of the run.
        examples: of the run.
        base_fingerprint: fingerprint of the base model, which the features of a cache belong to.

    Raises:
        UserError: a kind of media that the model does not support, or a cache that does not fit.
    """
    # Only video models have this setting.
    num_frames = cfg.model.get("num_frames", 1)

    # Without a cache, each collator opens pictures itself.
    media = None
    if cfg.data.cache:
        # A cache holds the features of one reducer. `train.checks` allows no more.
        (reducer,) = reducers

        # The cache must belong to the same model, reducer, processor and examples.
        settings = cache_settings(
            family,
            reducer,
            processor,
            base_fingerprint=base_fingerprint,
            examples_name=name_of_examples(examples),
            num_frames=num_frames,
        )
        media = open_cache(examples.path.parent, settings)

    collators = []
    for reducer in reducers:
        collators.append(
            Collator(processor, family, reducer, kinds=examples.kinds, num_frames=num_frames, media=media)
        )
    return collators
