"""No secret of an address is left in what is shown, recorded or sent, and the rest stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzip.errors import UserError
from vzip.redact import redacted, redacted_values

ADDRESSES = {
    "https://host/a.json": "https://host/a.json",
    "https://me:s3cret@host:8080/a/b.zip": "https://***@host:8080/a/b.zip",
    "https://s3cret@host/": "https://***@host/",
    "http://me:s3@cret@host/a": "http://***@host/a",
    "http://me:s3/cret@host/a": "http://***@host/a",
    "http://me:s3?cret@host/a": "http://***@host/a",
    "http://host:8080/a@2x.png": "http://host:8080/a@2x.png",
    "http://host/a@2x.png": "http://host/a@2x.png",
    "https://b.s3.x/a?X-Amz-Signature=s3cret&X-Amz-Date=1": (
        "https://b.s3.x/a?X-Amz-Signature=***&X-Amz-Date=***"
    ),
    "https://host/a?s3cret": "https://host/a?***",
    "https://host/a?se=1&sig=s3%2Fcret%3D": "https://host/a?se=***&sig=***",
    "https://host/a#token=s3cret": "https://host/a#token=***",
    "socks5://me:s3cret@proxy:1": "socks5://***@proxy:1",
}
OTHERS = ("", "/data/a#1/b?c=d.json", "What is 1:2@3?", "USER: {q} ASSISTANT:", "C:\\a", "a//b@c")


@pytest.mark.parametrize(
    ("address", "expected"), [*ADDRESSES.items(), *((text, text) for text in OTHERS)], ids=str
)
def test_an_address_loses_its_secrets_and_nothing_else(address, expected):
    assert redacted(address) == expected
    assert redacted(expected) == expected


def test_every_address_of_a_text_and_of_our_messages_is_redacted():
    text = (
        "data.pictures.coco=[http://me:s3cret@a/,https://b/?sig=s3cret] http://c/d?key=s3cret: answered 403, "
        "see 'http://e/?t=s3cret', (http://f/?t=s3cret). Max retries exceeded with url: /a?sig=s3cret"
    )
    assert (
        redacted(text)
        == str(UserError(text))
        == (
            "data.pictures.coco=[http://***@a/,https://b/?sig=***] http://c/d?key=***: answered 403, "
            "see 'http://e/?t=***', (http://f/?t=***). Max retries exceeded with url: /a?sig=***"
        )
    )


def test_settings_are_redacted_at_any_depth():
    settings = {"data": {"pictures": {"vg": ["http://me:s3cret@a/", None]}, "fraction": 0.1}, "seed": 0}
    assert redacted_values(settings) == {
        "data": {"pictures": {"vg": ["http://***@a/", None]}, "fraction": 0.1},
        "seed": 0,
    }


SECRET = st.text("abc-_~%.!$()*+:;=@,", min_size=3).map(lambda text: f"s3cret{text}s3cret")


@given(secret=SECRET, before=st.sampled_from(["", "[", "('", "see "]), after=st.sampled_from(["", "]", "')"]))
def test_no_secret_survives(secret, before, after):
    login = redacted(f"{before}http://me:{secret}@host/a{after}")
    query = redacted(f"{before}http://host/a?b=1&sig={secret}&c=2{after}")
    assert "s3cret" not in login + query
    assert login == f"{before}http://***@host/a{after}"
    assert query == f"{before}http://host/a?b=***&sig=***&c=***{after}"
