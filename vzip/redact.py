"""Take the secrets out of addresses before they are shown, recorded or sent.

An address can hold a login (`https://user:password@host/`) or a signature in its query
(`?X-Amz-Signature=...`). This module imports nothing but the standard library.
"""

import re
from typing import Any

HIDDEN = "***"
"""What stands in a text where a secret was."""

LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
"""A login in front of a host: everything up to the last @."""

# `LOGIN` misses a password that holds "/", "?" or "#", because these end a host. The address is then
# invalid, and comes back in an error message. Digits alone behind the colon are a port: an @ further
# on belongs to the path.
BROKEN_LOGIN = re.compile(r"""(?<=://)[^/?#\s@:]*:(?!\d*(?:[/?#,;"'\s)\]]|$))[^\s@]*@""")
"""A login whose password holds characters that end a host."""

# The HTTP library writes "url: /path?query", without scheme and host.
QUERY = re.compile(r"""((?:://|\burl: /)[^\s"'<>?#]*[?#])([^\s"'<>]*?)(?=[:;,.)\]}]*(?:[\s"'<>]|$))""")
"""An address up to its query or fragment, and the query. Punctuation behind it is no part of it."""


def _without_values(match: re.Match[str]) -> str:
    """Hide the values of a query, and keep their names."""
    start, query = match.groups()
    if not query:
        return start

    # All values are hidden, because nobody knows all names of keys and signatures.
    parts = []
    for part in query.split("&"):
        name, equals, _ = part.partition("=")
        parts.append(f"{name}={HIDDEN}" if equals else HIDDEN)
    return start + "&".join(parts)


def redacted(text: str) -> str:
    """Hide logins and the values of queries in all addresses of a text, or in one address.

    A text without addresses does not change, and neither does one that was redacted before.
    """
    text = LOGIN.sub(f"{HIDDEN}@", text)
    text = BROKEN_LOGIN.sub(f"{HIDDEN}@", text)
    return QUERY.sub(_without_values, text)


def redacted_values(content: Any) -> Any:
    """Redact all texts in settings or in the content of a JSON file. Names of settings stay."""
    if isinstance(content, str):
        return redacted(content)
    if isinstance(content, dict):
        return {name: redacted_values(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [redacted_values(value) for value in content]
    return content
