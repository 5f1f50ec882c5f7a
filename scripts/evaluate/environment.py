"""Make `.venv-eval`, the environment of lmms-eval, on top of the packages of the running Python.

lmms-eval pins packages that the recipe needs in other versions, so it is not installed into
`.venv`. torch, transformers and vzip come from `.venv`. So a model answers exactly as it did after
tuning, and nothing large is installed twice.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from data.locks import locked
from data.paths import ROOT
from scripts.common.pip import check_pip
from vzip import UserError

FOLDER = ROOT / ".venv-eval"
REQUIREMENTS = ROOT / "requirements-eval.txt"
PATH_FILE = "beneath.pth"
"""File that adds the packages of the running Python to the environment."""
STAMP_FILE = "made-of"
"""File with a hash of everything that the environment depends on.

It is written last, so an unfinished environment has none.
"""


def _own_packages() -> list[str]:
    """List the folders with the packages of the running Python."""
    # Debian's Python calls its folder dist-packages.
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _stamp(requirements: Path) -> str:
    """Hash everything that the environment depends on."""
    ingredients = [requirements.read_text(), sys.version, *_own_packages()]
    return hashlib.sha256("\n".join(ingredients).encode()).hexdigest()


def _add_own_packages(folder: Path) -> None:
    """Let the environment see the packages of the running Python, behind its own."""
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))

    # Python reads .pth files after the folder itself, so the environment's own packages come first.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in _own_packages()]
    (packages / PATH_FILE).write_text("".join(lines))


def _install(python: Path, folder: Path, requirements: Path) -> None:
    """Install the requirements with the running Python's pip. Raises UserError if pip fails."""
    check_pip("installing lmms-eval")

    # --no-deps: the list is complete, and lmms-eval's own pins contradict the packages of .venv.
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    process = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise UserError(
            f"pip can't install lmms-eval into {folder}; connect to a package index, and run the same "
            f"command again. The end of its output:\n{process.stderr[-2000:]}"
        )


def eval_python(folder: Path = FOLDER, *, requirements: Path = REQUIREMENTS) -> Path:
    """Return the environment's Python.

    Make the environment first if it is missing, or was made from other requirements.

    Raises:
        UserError: pip can't install the requirements.
    """
    python = folder / "bin" / "python"
    stamp_file = folder / STAMP_FILE
    stamp = _stamp(requirements)

    # If two commands start together, one makes the environment and the other waits. The lock lies
    # beside it, because nobody may be able to write into the running Python's own environment.
    with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
        if stamp_file.is_file() and stamp_file.read_text() == stamp:
            return python

        # Start from an empty folder: it may hold half an environment, or one of another Python.
        print(f"making {folder.name}, once: lmms-eval and the packages it needs", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        _add_own_packages(folder)
        _install(python, folder, requirements)
        stamp_file.write_text(stamp)

    return python
