"""One per cent of the examples may be bad, and a refusal says which they are."""

import pytest

from data.conversations import BadExample
from data.examples.bad_examples import check_bad_share
from vzip import UserError


def bad_examples(**num_by_source):
    bad = []
    for source, count in num_by_source.items():
        bad += [BadExample(f"{source}-{number}", source, f"{number}.jpg: missing") for number in range(count)]
    return bad


@pytest.mark.parametrize(
    ("num_bad", "num_examples"), [(0, 1), (1, 100), (7, 700), (29, 2900), (6652, 665_298)]
)
def test_one_per_cent_may_be_bad_and_no_more(num_bad, num_examples):
    check_bad_share(bad_examples(coco=num_bad), num_examples)
    with pytest.raises(UserError, match=f"{num_bad + 1} of {num_examples} examples"):
        check_bad_share(bad_examples(coco=num_bad + 1), num_examples)


def test_a_refusal_counts_by_source_and_names_examples():
    with pytest.raises(UserError) as error:
        check_bad_share(bad_examples(vg=2, coco=9), 100)
    message = str(error.value)
    assert "coco: 9, vg: 2" in message
    assert "vg-0: 0.jpg: missing" in message
    assert message.count("missing") >= 5
    assert "data.image_folder" in message
