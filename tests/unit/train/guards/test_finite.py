"""Numbers that are not finite: which part is to blame, and nothing of them is kept."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.configs import composed
from train.guards.finite import check_finite, check_weights
from vzip import UserError


def engine_of(model):
    """The parts of an engine that the checks read, on a single rank."""
    return SimpleNamespace(
        family=SimpleNamespace(model=model),
        trainable=SimpleNamespace(parameters=dict(model.named_parameters())),
        sum_over_ranks=lambda values: values,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_blames_the_weights_and_later_ones_the_learning_rate(value):
    cfg = composed("optim.lr=1e-3", "model=llava-7b")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    arguments = {"engine": engine_of(model), "cfg": cfg}
    check_finite("loss", 1.5, step=0, **arguments)

    with pytest.raises(UserError, match=rf"the loss is {value} at step 3; lower optim\.lr=0\.001"):
        check_finite("loss", value, step=3, **arguments)
    with pytest.raises(UserError, match=r"before anything was tuned, though all weights .*float32"):
        check_finite("gradient norm", value, step=0, **arguments)
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(UserError, match=r"because 1\.weight holds .*model\.id=llava-hf/.*model\.projector"):
        check_finite("loss", value, step=0, **arguments)


def test_tuned_weights_are_checked_also_where_ranks_share_them_out():
    cfg = composed("model=llava-7b")
    model = nn.Linear(2, 2)
    check_weights(engine_of(model), cfg, num_done=4)

    # As DeepSpeed leaves a parameter under ZeRO 3.
    model.weight.ds_tensor = torch.tensor([1.0, float("nan")])
    model.weight.data = torch.empty(0)
    with pytest.raises(UserError, match=r"not finite after 4 steps; lower optim\.lr=.*optim\.weight_decay="):
        check_weights(engine_of(model), cfg, num_done=4)
