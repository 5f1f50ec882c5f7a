"""Tune the projector of a LLaVA-type model behind a token reducer: the table of contents of a run."""

import sys
from pathlib import Path

# Import from the repository, whatever folder this file is started in.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from train.guards.start import listen

# The imports below take seconds, and signals must end a run in order even then.
if __name__ == "__main__":
    listen()

import hydra
from omegaconf import DictConfig

from train import config
from train.batches import make_batches
from train.checkpoint import RunFolder, locked_run
from train.checks import check
from train.cli import exit_on_user_error
from train.engine import Engine
from train.evaluation.control import add_control, control_settings, has_control
from train.evaluation.evaluator import AnswerFiles, Evaluator
from train.evaluation.tables import print_results
from train.examples import training_collators, training_examples, training_subset
from train.hardware import device_name
from train.loop import fit
from train.models import load_family, quantize_language_model
from train.plan import print_plan
from train.ranks import get_world_size, init_distributed, leave_distributed, print_rank0
from train.track import Tracker
from train.trainable import make_trainable, print_trainable
from vzip.media import image_aspect_ratio
from vzip.runs.projector import fingerprint, projector_meta


def tune(cfg: DictConfig, run: RunFolder) -> list[dict]:
    """Run the recipe, or the rest of an interrupted run. Returns the scores of each setting."""
    reducers = config.build_reducers(cfg)
    template = config.instantiate_target(cfg.model.template)
    if run.result is not None:
        print_rank0(f"{run.path} is finished; fresh=true starts it over")
        return run.result["rows"]

    # Data first: a mistake in it should show before a large model is loaded.
    subset = training_subset(cfg)

    # The base model, on the CPU, with its starting projector in float32.
    family, processor = load_family(cfg)

    # meta.json names the base model by its fingerprint, taken before anything changes.
    base = fingerprint(family)
    source = {"base": cfg.model.id, "base_fingerprint": base, "projector": cfg.model.projector}
    meta = projector_meta(family, *reducers, **source, aspect_ratio=image_aspect_ratio(processor))

    # Freeze everything, then open the projector or LoRA weights, and print what is frozen.
    trainable = make_trainable(family, cfg.tune, seed=cfg.seed)
    print_rank0(print_trainable, family, trainable)

    # With quantize=..., hold the language model in 4 or 8 bits: after fingerprint and LoRA.
    quantize_language_model(family, cfg.quantize)

    # Tokenize the examples, plan the steps, and cut them into micro batches that fit into memory.
    examples = training_examples(cfg, subset, template, processor.tokenizer)
    plan = config.batch_plan(cfg, num_examples=len(examples), world_size=get_world_size())
    collators = training_collators(cfg, processor, family, reducers, examples, base_fingerprint=base)
    if cfg.data.cache and not config.asks_questions(cfg):
        family.drop_towers()  # the cache holds their features
    batches, loss = make_batches(cfg, family, trainable, collators, examples, plan)

    # Every check has passed: write the run's settings, and move the model to its device.
    run.begin(subset.manifest, num_trainable=trainable.num_parameters, world_size=plan.world_size)
    engine = Engine(loss, trainable, cfg)
    tracker = Tracker(run.path, cfg, rank=engine.rank)
    print_rank0(f"{run.path}: {plan.world_size} rank(s) on {device_name(engine.device)}, {tracker}")

    # Ask the held-out questions before training: with all tokens, and reduced but training-free.
    evaluator = Evaluator(cfg, engine, AnswerFiles(run.path), processor, template)
    settings = evaluator.baselines(reducers)

    # Train from the newest saved state on, and save the projector.
    fit(engine, batches, cfg, run, tracker)
    run.save_trained(engine, meta, reducer=reducers[0], template=template, manifest=subset.manifest)

    # Ask again, and draw the kept tokens. result.json comes last: it marks the run as finished.
    settings += evaluator.ask("tuned", reducers)
    pictures = evaluator.draw_kept_tokens(config.build_reducer(cfg), run.path)
    rows = [setting.row for setting in settings]
    run.finish(rows, num_steps=plan.num_steps, manifest=subset.manifest)
    tracker.log_results(settings, pictures)
    tracker.finish()
    return rows


@hydra.main(config_path="../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    init_distributed()
    check(cfg)
    if cfg.dry_run:
        print_rank0(print_plan, cfg, world_size=get_world_size())
        return

    control = control_settings(cfg) if cfg.control else None
    with locked_run(cfg) as run:
        rows = tune(cfg, run)
        if control and not has_control(rows):
            with locked_run(control) as second_run:  # an ordinary run, with random tokens
                rows = add_control(run, rows, tune(control, second_run))
    print_rank0(print_results, rows, title=f"{cfg.runs}/{config.run_name(cfg)}")


if __name__ == "__main__":
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]  # launchers add it
    config.register()
    main()
    leave_distributed()
