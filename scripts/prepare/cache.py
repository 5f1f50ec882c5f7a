"""Compute the reducer's output for a run's examples once, so that `data.cache=true` tunes from it.

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
from data.examples.unchanged import check_media_unchanged
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from train.models import load_family
from vzip.runs.projector import fingerprint


def cache_features(cfg: DictConfig) -> Path:
    """Compute the cache of a run, or what is missing of it. Return its folder."""
    reducer = config.build_reducer(cfg)
    template = config.instantiate_target(cfg.model.template)
    num_frames = cfg.model.get("num_frames", 1)
    family, processor = load_family(cfg)

    # Check the reducer first, because preparing the data takes longer.
    family.check_reducer(reducer)
    family.check_cacheable(reducer)

    # The same examples, in the same order, as in the run that tunes from the cache.
    subset = prepare(config.selection(cfg))
    check_media_unchanged(subset)
    examples = subset.examples(template, processor.tokenizer, max_tokens=cfg.data.max_tokens)

    # A run refuses a cache of other settings, so they are written with it.
    settings = cache_settings(
        family,
        reducer,
        processor,
        base_fingerprint=fingerprint(family),
        examples_name=name_of_examples(examples),
        num_frames=num_frames,
    )

    # Only the tower runs. It moves to its device with the whole model.
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
    # Check the settings as a run that tunes from the cache would, before the work and not after it.
    check(OmegaConf.merge(cfg, {"data": {"cache": True}}))

    start = time.perf_counter()
    folder = cache_features(cfg)
    seconds = time.perf_counter() - start

    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"{megabytes:,.1f} MB, {seconds:,.0f} s; {folder}; tune with data.cache=true")


if __name__ == "__main__":
    config.register()
    main()
