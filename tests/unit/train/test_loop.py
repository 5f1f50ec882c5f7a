"""The learning rate of each step."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.loop import learning_rate


def rates(num_steps, warmup=0.03, peak=1.0):
    return [learning_rate(step, num_steps=num_steps, peak=peak, warmup=warmup) for step in range(num_steps)]


def test_the_rate_warms_up_peaks_and_decays_to_zero():
    all_rates = rates(100)
    assert all_rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all_rates[3] == 1 and max(all_rates) == 1
    assert all(after < before for before, after in pairwise(all_rates[3:]))
    assert 0 < all_rates[-1] < 1e-3
    assert all_rates[3 + 97 // 2] == pytest.approx(0.5, abs=0.02)
    assert learning_rate(100, num_steps=100, peak=1.0, warmup=0.03) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.99])
def test_a_run_of_one_step_uses_the_peak(warmup):
    assert rates(1, warmup, peak=2e-5) == [2e-5]
    assert rates(10, warmup=0)[0] == 1


@given(num_steps=st.integers(1, 400), warmup=st.floats(0, 1, exclude_max=True))
def test_the_rate_is_positive_and_never_above_the_peak(num_steps, warmup):
    assert all(math.isfinite(rate) and 0 < rate <= 2e-3 for rate in rates(num_steps, warmup, peak=2e-3))
