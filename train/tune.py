"""Tune the projector of a LLaVA-type model behind a token reducer: the table of contents of a run.

make tune MODEL=llava-7b        deepspeed train/tune.py model=llava-7b        python train/tune.py model=smol
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # the repository, from wherever this file is started
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # on CPU: threads that spin while others work stall a busy machine
os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # on GPU: packed lengths differ each time

import deepspeed
import hydra
from omegaconf import DictConfig

from train import config
from train.batches import make_batches
from train.checkpoint import RunFolder
from train.checks import check
from train.cli import exit_on_user_error
from train.control import control_row
from train.engine import Engine
from train.evaluate import Evaluator, print_results
from train.examples import training_collators, training_examples, training_subset
from train.hardware import device_name
from train.loop import fit
from train.models import load_family, quantize_language_model
from train.overlay import draw_examples
from train.plan import print_plan
from train.ranks import init_distributed, leave_distributed, print_rank0
from train.track import Tracker
from train.trainable import make_trainable, print_trainable
from vzip import attach
from vzip.runs.projector import fingerprint, projector_meta


def tune(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run the recipe, or the rest of it: the rows of result.json."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    reducers, template = config.build_reducers(cfg), config.instantiate_target(cfg.model.template)
    run = RunFolder(cfg, rank=rank)
    if run.result is not None:
        print_rank0(f"{run.path} is finished; fresh=true starts it over")
        return run.result["rows"]
    control = control_row(cfg, tune)

    subset = training_subset(cfg)
    family, processor = load_family(cfg)
    for reducer in reducers:
        family.refuse_unfit(reducer)
    meta = projector_meta(
        family,
        *reducers,
        base=cfg.model.id,
        base_fingerprint=fingerprint(family),
        projector=cfg.model.projector,
    )
    trainable = make_trainable(family, cfg.tune)
    print_rank0(print_trainable, family, trainable)
    quantize_language_model(family, cfg.quantize)

    examples = training_examples(cfg, subset, template, processor.tokenizer)
    plan = config.batch_plan(cfg, num_examples=len(examples), world_size=world_size)
    collators = training_collators(
        cfg, processor, family, reducers, examples, base_fingerprint=meta["base"]["fingerprint"]
    )
    batches, loss = make_batches(cfg, family, trainable, collators, examples, plan)
    run.begin(subset.manifest, num_trainable=trainable.num_parameters, world_size=world_size)

    engine = Engine(loss, trainable, cfg)
    tracker = Tracker(run.path, cfg, rank=rank)
    print_rank0(f"{run.path}: {world_size} rank(s) on {device_name(engine.device)}, {tracker}")
    evaluator = Evaluator(cfg, engine, run, processor, template)
    rows = evaluator.baselines(reducers)
    fit(engine, batches, cfg, run, tracker)
    run.save_trained(
        engine,
        meta | run.trained_meta(engine, template, subset.manifest, family.num_image_tokens(reducers[0])),
    )
    with attach(family.model, reducer=config.build_reducer(cfg)) as handle:
        pictures = draw_examples(handle, processor.image_processor, evaluator.pictures, run.path)
    rows += evaluator.rows("tuned", reducers) + control
    run.finish(
        {"rows": rows, "num_steps": plan.num_steps, "manifest": subset.manifest["hash"], "seed": cfg.seed}
    )
    tracker.log_results(rows, evaluator.samples, pictures)
    tracker.finish()
    return rows


@hydra.main(config_path="../configs", config_name="tune", version_base="1.3")
@exit_on_user_error
def main(cfg: DictConfig) -> None:
    init_distributed()
    check(cfg)
    if cfg.dry_run:
        print_rank0(print_plan, cfg, world_size=deepspeed.comm.get_world_size())
    else:
        print_rank0(print_results, tune(cfg), title=f"{cfg.runs}/{config.run_name(cfg)}")


if __name__ == "__main__":
    sys.argv = [
        argument for argument in sys.argv if not argument.startswith("--local_rank")
    ]  # from the launcher
    config.register()
    main()
    leave_distributed()
