"""Check a model's data before a GPU is taken: every picture, every row's labels and length; a table, check.json and check.png.

make data-check MODEL=llava-7b        python -m scripts.prepare.check model=llava-7b reducer.budget=128
"""

import hydra
from omegaconf import DictConfig

from data.examples.prepare import prepare
from data.paths import write_json
from data.preflight.check import check_faults, check_files, measure_lengths, report
from data.preflight.show import draw_report, print_report
from train import config
from train.checks import check
from train.cli import exit_on_user_error
from train.models import count_model, load_unreduced_processor


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    check(cfg)
    family, reducer = count_model(cfg).without_weights(), config.build_reducer(cfg)
    family.refuse_unfit(reducer)
    subset = prepare(config.selection(cfg))
    if config.asks_questions(cfg):
        prepare(config.held_out(cfg))
    template, tokenizer = (
        config.instantiate_target(cfg.model.template),
        load_unreduced_processor(cfg).tokenizer,
    )
    table = subset.examples(template, tokenizer, max_tokens=cfg.data.max_tokens).table

    lengths = measure_lengths(table, family, reducer, num_frames=cfg.model.get("num_frames", 1))
    files = check_files(table, subset.image_folder, seed=cfg.seed)
    found = report(
        lengths,
        files,
        subset.manifest["bad_rows"],
        max_tokens=cfg.data.max_tokens,
        max_positions=family.model.config.get_text_config().max_position_embeddings,
    )
    write_json(subset.folder / "check.json", found)
    draw_report(lengths, found, subset.folder / "check.png")
    print_report(found)
    print(f"{subset.folder}: check.json, check.png")
    check_faults(found, subset.folder)


if __name__ == "__main__":
    config.register()
    main()
