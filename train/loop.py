"""The training loop."""

import math
import time
from itertools import islice

import torch
from omegaconf import DictConfig

from data.batches.dataset import MicroBatches, explain_workers, loader
from data.progress import progress
from train.checkpoint import RunFolder
from train.engine import Engine
from train.track import Tracker, memory_gb
from vzip import UserError


def learning_rate(step: int, *, num_steps: int, peak: float, warmup: float) -> float:
    """Linear warmup over `warmup` * num_steps steps (rounded up), then a cosine to zero at num_steps."""
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / (num_steps - num_warmup)))


@explain_workers()
def fit(engine: Engine, batches: MicroBatches, cfg: DictConfig, run: RunFolder, tracker: Tracker) -> None:
    """Tune for `batches.plan.num_steps` steps, from the newest saved state on, saving one every `cfg.save_every` steps."""
    first = run.resume(engine)
    tracker.forget_from(first)
    micro_batches = iter(loader(batches, first=first, num_workers=cfg.data.num_workers))
    bar = progress(
        range(first, batches.plan.num_steps),
        total=batches.plan.num_steps,
        start=first,
        title="tune",
        unit="step",
        shown=engine.rank == 0,
    )
    for step in bar:
        start = time.perf_counter()
        torch.manual_seed(
            cfg.seed * 1_000_003 + step * engine.world_size + engine.rank
        )  # resuming needs no saved RNG
        parts = list(islice(micro_batches, batches.num_parts(step)))
        lr = learning_rate(step, num_steps=batches.plan.num_steps, peak=cfg.optim.lr, warmup=cfg.optim.warmup)
        loss, grad_norm = engine.step(
            parts,
            lr=lr,
            num_labels=batches.num_labels(step),
            num_grad_labels=batches.num_grad_labels(step),
        )
        seconds = time.perf_counter() - start
        num_tokens = batches.num_tokens(step)
        metrics = {
            "train/loss": loss,
            "train/lr": lr,
            "train/grad_norm": grad_norm,
            "train/tokens_per_s": num_tokens / seconds,
            "train/step_s": seconds,
            "train/memory_gb": memory_gb(engine.device),
        }
        tracker.log(step, metrics)
        bar.set_postfix_str(
            f"loss {loss:.3f}, {num_tokens / seconds:,.0f} tokens/s, {metrics['train/memory_gb']:.1f} GB",
            refresh=False,
        )
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step}; lower optim.lr={cfg.optim.lr}, and start over with fresh=true"
            )
        if (step + 1) % cfg.save_every == 0 and step + 1 < batches.plan.num_steps:
            run.save_state(engine, step + 1)
