"""One per cent of the examples may be bad."""

import pytest

from data.conversations import BadExample
from data.examples.bad_examples import check_bad_share
from vzip import UserError


@pytest.mark.parametrize(
    ("num_bad", "num_examples"), [(0, 1), (1, 100), (7, 700), (29, 2900), (6652, 665_298)]
)
def test_one_per_cent_may_be_bad_and_no_more(num_bad, num_examples):
    bad = [BadExample(str(number), "coco", "1.jpg: missing") for number in range(num_bad + 1)]
    check_bad_share(bad[:-1], num_examples)
    with pytest.raises(UserError, match=f"{num_bad + 1} of {num_examples} examples"):
        check_bad_share(bad, num_examples)
