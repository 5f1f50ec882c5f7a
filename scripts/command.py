"""How the commands beside tuning end: a user's mistake is one message and exit code 2, not a traceback."""

import sys
from collections.abc import Callable
from pathlib import Path

from vzip import UserError


def run(main: Callable[[], None]) -> None:
    """Run a command."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
