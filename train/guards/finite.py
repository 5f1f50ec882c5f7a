"""Checks that numbers are finite, so that no state and no projector ever holds anything else."""

import math

import torch
from omegaconf import DictConfig
from torch import nn

from train.engine import Engine
from vzip import UserError


def _num_not_finite(parameter: nn.Parameter) -> int:
    """Count the numbers of a parameter that are not finite. Under ZeRO 3, in this rank's share of it."""
    # DeepSpeed keeps the rank's share in `ds_tensor`, and leaves the parameter itself empty.
    values = getattr(parameter, "ds_tensor", parameter).detach()
    return int((~torch.isfinite(values)).sum())


def check_finite(what: str, value: float, *, step: int, engine: Engine, cfg: DictConfig) -> None:
    """Check the loss or the gradient norm of a step.

    Args:
        what: how messages call the number.
        value: the number, the same on all ranks.
        step: number of the step, from 0.
        engine: holds the model that computed it.
        cfg: the run's settings.

    Raises:
        UserError: it is not finite.
    """
    if math.isfinite(value):
        return
    problem = f"the {what} is {value} at step {step}"

    # After the first step, the cause is usually the tuning itself.
    if step > 0:
        raise UserError(f"{problem}; lower optim.lr={cfg.optim.lr}, and start over with fresh=true")

    # At the first step, no setting of the optimizer has changed anything yet: look at the weights.
    for name, parameter in engine.family.model.named_parameters():
        if _num_not_finite(parameter):
            raise UserError(
                f"{problem}, before anything was tuned, because {name} holds numbers that are not "
                f"finite; get model.id={cfg.model.id} and model.projector={cfg.model.projector} again, "
                f"or use others"
            )
    raise UserError(
        f"{problem}, before anything was tuned, though all weights are finite: numbers grow too large "
        f"for model.dtype={cfg.model.dtype}; try model.dtype=float32, or another model.id"
    )


def check_weights(engine: Engine, cfg: DictConfig, *, num_done: int) -> None:
    """Check the tuned weights before they are saved or kept. Called by all ranks.

    Args:
        engine: holds the weights.
        cfg: the run's settings.
        num_done: steps that are done.

    Raises:
        UserError: some weights are not finite.
    """
    # Ranks hold the same weights, or a share each. Either way, a sum of 0 means that all are finite.
    own = sum(_num_not_finite(parameter) for parameter in engine.trainable.parameters.values())
    (total,) = engine.sum_over_ranks([own])
    if total:
        raise UserError(
            f"tuned weights are not finite after {num_done} steps; lower optim.lr={cfg.optim.lr} or "
            f"optim.weight_decay={cfg.optim.weight_decay}, and start over with fresh=true"
        )
