"""The training loop: for each step, forward and backward of its micro batches, then AdamW."""

import math
import time
from collections.abc import Iterator
from itertools import islice

import torch
from omegaconf import DictConfig

from data.batches.collate import MicroBatch
from data.batches.dataset import MicroBatches, explain_workers, loader
from data.progress import progress
from train.checkpoint import RunFolder
from train.engine import Engine
from train.guards.finite import check_finite, check_weights
from train.guards.signals import STOP, Stopped
from train.track import Tracker, memory_gb


def learning_rate(step: int, *, num_steps: int, peak: float, warmup: float) -> float:
    """Compute the learning rate: a linear warmup, then a cosine that reaches zero at `num_steps`.

    Args:
        step: number of the step, from 0.
        num_steps: steps of the run.
        peak: the rate after the warmup.
        warmup: share of the steps that warm up, rounded up to whole steps.
    """
    # The first step already learns: it has the rate 1 / num_warmup of the peak, not 0.
    num_warmup = math.ceil(warmup * num_steps)
    if step < num_warmup:
        return peak * (step + 1) / num_warmup

    # Then from the peak, at the first step after the warmup, along half a cosine.
    decayed = (step - num_warmup) / (num_steps - num_warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * decayed))


def train_step(
    engine: Engine,
    batches: MicroBatches,
    micro_batches: Iterator[MicroBatch],
    step: int,
    cfg: DictConfig,
) -> dict[str, float]:
    """Take one optimizer step on the mean loss over the label tokens of the global batch.

    Args:
        engine: the model and its optimizer.
        batches: the plan of the steps, and their token counts.
        micro_batches: this rank's micro batches, from the first one of this step on.
        step: number of the step, from 0.
        cfg: the run's settings.

    Returns:
        loss, learning rate and gradient norm, as the tracker names them

    Raises:
        UserError: the loss or the gradient norm is not finite.
    """
    # Derive the seed from the step, so that resuming needs no saved state of the random generator.
    torch.manual_seed(cfg.seed * 1_000_003 + step * engine.world_size + engine.rank)

    # Divide by the label tokens of all ranks, which are counted in advance: the loss does not
    # depend on how the batch is cut. Multiply by the number of ranks, because DeepSpeed averages
    # gradients over them.
    scale = engine.world_size / max(batches.num_labels(step), 1)

    # Forward and backward, one micro batch after the other. Their gradients add up.
    num_micro_batches = batches.num_micro_batches(step)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for number, micro_batch in enumerate(islice(micro_batches, num_micro_batches), start=1):
        loss, reported = engine.forward(micro_batch)
        loss_sum += reported
        engine.backward(loss * scale, is_last=number == num_micro_batches)

    # Report the mean over the label tokens that the trainable parameters learn from. The ranks also
    # tell each other about signals here, so that all of them stop after the same step.
    total, *flags = engine.sum_over_ranks([loss_sum.item(), *STOP.flags()])
    STOP.agree(flags)
    loss_mean = total / max(batches.num_grad_labels(step), 1)
    check_finite("loss", loss_mean, step=step, engine=engine, cfg=cfg)

    # The weights change here, and nowhere else.
    num_steps = batches.plan.num_steps
    lr = learning_rate(step, num_steps=num_steps, peak=cfg.optim.lr, warmup=cfg.optim.warmup)
    grad_norm = engine.optimizer_step(lr)
    check_finite("gradient norm", grad_norm, step=step, engine=engine, cfg=cfg)
    return {"train/loss": loss_mean, "train/lr": lr, "train/grad_norm": grad_norm}


@explain_workers()
@STOP.noted()
def fit(engine: Engine, batches: MicroBatches, cfg: DictConfig, run: RunFolder, tracker: Tracker) -> None:
    """Train from the newest saved state, or from the start, to the last step.

    Args:
        engine: the model and its optimizer.
        batches: this rank's micro batches, and the plan of the steps.
        cfg: the run's settings.
        run: where the state is saved, every `cfg.save_every` steps.
        tracker: where the metrics go.

    Raises:
        UserError: a number is not finite, or a picture can't be loaded any more.
        Stopped: a signal asked a rank to stop, and the state is saved.
    """
    # Steps since the saved state are taken again, so their metrics are dropped.
    num_steps = batches.plan.num_steps
    first = run.resume(engine)
    tracker.forget_from(first)

    # Worker processes load pictures ahead of the steps that need them.
    micro_batches = iter(loader(batches, first=first, num_workers=cfg.data.num_workers))
    steps = range(first, num_steps)
    is_shown = engine.rank == 0
    bar = progress(steps, total=num_steps, start=first, title="tune", unit="step", shown=is_shown)
    for step in bar:
        # The time of a step includes waiting for its pictures.
        start = time.perf_counter()
        metrics = train_step(engine, batches, micro_batches, step, cfg)
        seconds = time.perf_counter() - start

        metrics["train/tokens_per_s"] = batches.num_tokens(step) / seconds
        metrics["train/step_s"] = seconds
        metrics["train/memory_gb"] = memory_gb(engine.device)
        tracker.log(step, metrics)
        bar.set_postfix_str(_summary(metrics), refresh=False)

        # Save every few steps, but not after the last one: the result follows it at once. Weights are
        # kept even there, so check them.
        num_done = step + 1
        is_last = num_done == num_steps
        is_saved = STOP.agreed or (num_done % cfg.save_every == 0 and not is_last)
        if is_saved or is_last:
            check_weights(engine, cfg, num_done=num_done)
        if is_saved:
            run.save_state(engine, num_done)
        if STOP.agreed:
            raise Stopped(STOP.agreed, num_done, num_steps)


def _summary(metrics: dict[str, float]) -> str:
    """Write what the progress bar shows of a step."""
    loss = metrics["train/loss"]
    tokens_per_s = metrics["train/tokens_per_s"]
    return f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s, {metrics['train/memory_gb']:.1f} GB"
