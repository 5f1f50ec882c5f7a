"""Compute the reducer's output of a run's subset once: `data.cache=true` then tunes from that.

make cache MODEL=llava-7b        python -m scripts.prepare.cache model=llava-7b
"""

import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from data.batches.media import ProcessedMedia
from data.cache.features import cache_settings, name_of_examples
from data.cache.make_features import FeatureMaker, make_cache
from data.examples.prepare import prepare
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from train.models import load_family
from vzip.runs.projector import fingerprint


def cache_features(cfg: DictConfig) -> Path:
    """Compute the cache of a run, or what is missing of it, and return its folder."""
    reducer = config.build_reducer(cfg)
    template = config.instantiate_target(cfg.model.template)
    num_frames = cfg.model.get("num_frames", 1)
    family, processor = load_family(cfg)

    # Before the data is looked at, which takes longer.
    family.check_reducer(reducer)
    family.check_cacheable(reducer)

    subset = prepare(config.selection(cfg))
    examples = subset.examples(template, processor.tokenizer, max_tokens=cfg.data.max_tokens)
    settings = cache_settings(
        family,
        reducer,
        processor,
        base_fingerprint=fingerprint(family),
        examples_name=name_of_examples(examples),
        num_frames=num_frames,
    )

    # Only the tower runs, but it stands in the whole model.
    family.model.to("cuda" if torch.cuda.is_available() else "cpu")
    media = ProcessedMedia(processor, family.without_weights(), reducer, num_frames=num_frames)
    return make_cache(
        subset.folder,
        examples,
        FeatureMaker(family, reducer, media),
        settings,
        batch=cfg.batch.micro,
        num_workers=cfg.data.num_workers,
    )


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    # The checks of a run that tunes from the cache, before the work instead of after it.
    check(OmegaConf.merge(cfg, {"data": {"cache": True}}))

    start = time.perf_counter()
    folder = cache_features(cfg)
    seconds = time.perf_counter() - start

    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{megabytes:,.1f} MB, {seconds:,.0f} s; {folder}; tune with data.cache=true")


if __name__ == "__main__":
    config.register()
    main()
