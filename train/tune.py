"""Tune the projector of a LLaVA-type model behind a token reducer: the table of contents of a run.

make tune MODEL=llava-7b        deepspeed train/tune.py model=llava-7b        python train/tune.py model=smol
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, from wherever this file is started
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on CPU: threads that spin while others work stall a busy machine

import deepspeed
import hydra
from omegaconf import DictConfig

from data.dataset import MicroBatches
from train import config
from train.checkpoint import RunFolder
from train.control import control_row
from train.engine import Engine
from train.evaluate import Evaluator, print_results
from train.examples import training_collator, training_examples, training_subset
from train.loop import fit
from train.models import load_model
from train.overlay import draw_examples
from train.plan import print_plan
from train.ranks import init_distributed, leave_distributed, say
from train.track import Tracker
from train.trainable import make_trainable, print_table
from vzip import attach
from vzip.io import describe, fingerprint


def tune(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run the recipe, or the rest of it: the rows of result.json."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    reducer, template = config.build_reducer(cfg), config.build(cfg.model.template)
    run = RunFolder(cfg, rank=rank)
    if run.result is not None:
        say(f"{run.path} is finished; fresh=true starts it over")
        return run.result["rows"]
    control = control_row(cfg, tune)

    subset = training_subset(cfg)
    family, processor = load_model(cfg)
    family.refuse_unfit(reducer)
    meta = describe(family, reducer, base=cfg.model.id, base_fingerprint=fingerprint(family))
    trainable = make_trainable(family, cfg.tune)
    say(print_table, family, trainable)

    examples = training_examples(cfg, subset, template, processor.tokenizer)
    plan = config.batch_plan(cfg, num_rows=len(examples), world_size=world_size)
    collate = training_collator(cfg, processor, family, reducer, examples, base_fingerprint=meta["base"]["fingerprint"])
    batches = MicroBatches(examples, collate, plan, rank=rank)
    say(f"{run.path}: {plan}")
    run.begin(subset.manifest, num_trainable=trainable.num_parameters, world_size=world_size)

    engine = Engine(family, trainable, cfg, accumulation=plan.accumulation)
    tracker = Tracker(run.path, cfg, rank=rank)
    evaluator = Evaluator(cfg, engine, run, processor, template)
    rows = evaluator.baselines(reducer)
    with attach(family.model, reducer=reducer) as handle:
        fit(engine, batches, cfg, run, tracker)
        run.save_trained(engine, meta | run.trained_meta(engine, subset.manifest, family.num_image_tokens(reducer)))
        pictures = draw_examples(handle, processor.image_processor, evaluator.pictures, run.path)
    rows += evaluator.rows("tuned", reducer) + control
    tracker.log_results(rows, evaluator.samples, pictures)
    tracker.finish()
    run.finish({"rows": rows, "num_steps": plan.num_steps, "manifest": subset.manifest["hash"], "seed": cfg.seed})
    return rows


@hydra.main(config_path="../configs", config_name="tune", version_base="1.3")
@config.teach
def main(cfg: DictConfig) -> None:
    init_distributed()
    config.check(cfg)
    if cfg.dry_run:
        say(print_plan, cfg, world_size=deepspeed.comm.get_world_size())
    else:
        say(print_results, tune(cfg), title=f"{cfg.runs}/{config.run_name(cfg)}")
    leave_distributed()


if __name__ == "__main__":
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank")]  # from the launcher
    config.register()
    main()
