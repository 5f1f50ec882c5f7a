"""Check a model's data before a GPU is taken: every image, label and length.

It prints a table, and writes check.json and check.png into the folder of the prepared data.

make data-check MODEL=llava-7b
python -m scripts.prepare.check model=llava-7b reducer.budget=128
"""

import hydra
from omegaconf import DictConfig

from data.examples.prepare import prepare
from data.examples.unchanged import check_media_unchanged
from data.preflight.check import check_subset
from data.preflight.lengths import measure_lengths
from train import config
from train.batches import gradient_mask
from train.checks import check
from train.cli import exit_on_user_error
from train.models import count_model, load_unreduced_processor
from train.ranks import get_world_size


def check_data(cfg: DictConfig) -> None:
    """Check the data of a run, and print and write the report. Raises UserError if it has faults."""
    # The checks need no weights, so the model is built without them, in seconds.
    family = count_model(cfg).without_weights()
    reducer = config.build_reducer(cfg)
    family.check_reducer(reducer)
    processor = load_unreduced_processor(cfg)
    family.read_processor(processor)

    # Prepare the held-out questions too. Otherwise a mistake in them would show after the tuning.
    subset = prepare(config.selection(cfg))
    if config.asks_questions(cfg):
        questions = prepare(config.held_out(cfg))
        check_media_unchanged(questions, num_hashed=questions.manifest["num_rows"])

    # Tokenize as the run will, so that its labels and lengths are checked, not an estimate.
    template = config.instantiate_target(cfg.model.template)
    examples = subset.examples(template, processor.tokenizer, max_tokens=cfg.data.max_tokens)

    # An example's length depends on the reducer, and on the sizes of its pictures.
    num_frames = cfg.model.get("num_frames", 1)
    lengths = measure_lengths(examples.table, family, reducer, num_frames=num_frames)
    check_subset(
        subset,
        examples,
        lengths,
        max_tokens=cfg.data.max_tokens,
        max_positions=family.model.config.get_text_config().max_position_embeddings,
        seed=cfg.seed,
    )

    # Two more checks of a run: whether there are enough examples, and some with a gradient.
    config.batch_plan(cfg, num_examples=len(examples), world_size=get_world_size())
    lora = cfg.tune.lora
    gradient_mask(cfg, examples, tunes_language=lora is not None and lora.target != "projector")


@hydra.main(config_path="../../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    check(cfg)
    check_data(cfg)


if __name__ == "__main__":
    config.register()
    main()
