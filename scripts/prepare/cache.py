"""Compute the reducer's output of a run's subset once: `data.cache=true` then tunes from that.

make cache MODEL=llava-7b        python -m scripts.prepare.cache model=llava-7b
"""

import time
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from data.batches.media import Processed
from data.cache.features import CacheLayout, cache_settings, folder_of, media_of_examples
from data.cache.make_features import FeatureMaker, examples_per_shard, write_features
from data.examples.prepare import prepare
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from train.models import load_family
from vzip.runs.projector import fingerprint


def cache_features(cfg: DictConfig) -> Path:
    """The folder of the whole cache; what a killed command made is not made again."""
    reducer, template, num_frames = (
        config.build_reducer(cfg),
        config.instantiate_target(cfg.model.template),
        cfg.model.get("num_frames", 1),
    )
    family, processor = load_family(cfg)
    family.refuse_unfit(reducer)
    family.refuse_uncacheable(reducer)
    subset = prepare(config.selection(cfg))
    examples = subset.examples(template, processor.tokenizer, max_tokens=cfg.data.max_tokens)

    settings = cache_settings(
        family,
        reducer,
        processor,
        base_fingerprint=fingerprint(family),
        rows=media_of_examples(examples),
        num_frames=num_frames,
    )
    layout = CacheLayout(settings, len(examples), examples_per_shard(family, reducer, settings))
    family.model.to("cuda" if torch.cuda.is_available() else "cpu")
    maker = FeatureMaker(
        family, reducer, Processed(processor, family.without_weights(), reducer, num_frames=num_frames)
    )
    folder = folder_of(subset.folder, settings)
    write_features(folder, layout, examples, maker, batch=cfg.batch.micro, num_workers=cfg.data.num_workers)
    return folder


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    check(OmegaConf.merge(cfg, {"data": {"cache": True}}))
    start = time.perf_counter()
    folder = cache_features(cfg)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{size / 1e6:,.1f} MB, {time.perf_counter() - start:,.0f} s; {folder}; tune with data.cache=true")


if __name__ == "__main__":
    config.register()
    main()
