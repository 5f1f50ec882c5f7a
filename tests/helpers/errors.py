"""Checks of errors that the user can fix."""

import pytest

from vzip import UserError


def refused(function, *arguments, words, **keywords):
    """Check that a call raises a UserError whose message holds all the words."""
    with pytest.raises(UserError) as error:
        function(*arguments, **keywords)

    message = str(error.value)
    assert all(word in message for word in words), message
