"""Addresses of the web: the login in them, and where a redirect leads."""

from base64 import b64encode
from urllib.parse import unquote, urljoin

from urllib3.util import parse_url

from vzip.redact import redacted

Origin = tuple[str | None, str | None, int]
"""Scheme, host and port of an address."""


def basic_login(login: str) -> str:
    """Return the header that sends "user:password", in which special characters are quoted."""
    # The HTTP library would encode it in latin-1, which lacks most letters.
    text = unquote(login) if ":" in login else f"{unquote(login)}:"
    return f"Basic {b64encode(text.encode()).decode()}"


def split_login(address: str) -> tuple[str, str | None]:
    """Return an address without the login in it, and the header that sends the login."""
    parts = parse_url(address)
    if parts.auth is None:
        return address, None
    return parts._replace(auth=None).url, basic_login(parts.auth)


def origin(address: str) -> Origin:
    """Return scheme, host and port. A login is only sent to its own."""
    parts = parse_url(address)
    usual_port = 443 if parts.scheme == "https" else 80
    return parts.scheme, parts.host, parts.port or usual_port


def redirected(address: str, location: str) -> str:
    """Return the address that a redirect leads to.

    Args:
        address: what was asked for.
        location: the server's answer, often only a path.

    Raises:
        ValueError: the answer is no address of the web, or less safe than the first one.
    """
    shown = redacted(location)
    try:
        # A login in the answer would be the server's, and not the user's.
        target, _ = split_login(urljoin(address, location))
        scheme, host, _ = origin(target)
    except ValueError as error:
        raise ValueError(f"redirects to {shown!r}, which is not an address") from error

    if scheme not in ("http", "https") or not host:
        raise ValueError(f"redirects to {shown!r}, which is not a web address (http://, https://)")
    # Anybody on the way can read and change what comes without encryption.
    if origin(address)[0] == "https" and scheme == "http":
        raise ValueError(f"redirects from https to http ({shown}), which is not safe")
    return target
