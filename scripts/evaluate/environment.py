"""The environment of lmms-eval, `.venv-eval`: its own packages on top of those of the Python that runs this.

lmms-eval pins packages that the recipe has in other versions, so it is kept out of `.venv`. torch, transformers and vzip are
those of `.venv`, so that a model answers as it did after tuning, and nothing large is installed twice.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from filelock import FileLock

from scripts.common.timing import ROOT
from vzip import UserError

FOLDER, REQUIREMENTS = ROOT / ".venv-eval", ROOT / "requirements-eval.txt"
PATH_FILE = "beneath.pth"


def _beneath() -> list[str]:
    """Where this Python's packages are."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _wanted(requirements: Path) -> str:
    """What the environment depends on."""
    return hashlib.sha256(
        "\n".join([requirements.read_text(), sys.version, *_beneath()]).encode()
    ).hexdigest()


def _make(folder: Path, requirements: Path) -> None:
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    ours = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=ours))
    # Read last: what is installed in the environment itself comes first.
    (packages / PATH_FILE).write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in _beneath())
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--disable-pip-version-check",
        "install",
        "--quiet",
    ]
    done = subprocess.run(
        [*command, "--no-deps", "--requirement", str(requirements)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"pip can't install lmms-eval into {folder}; connect to a package index and run the same command again:\n"
            f"{done.stderr[-2000:]}"
        )


def eval_python(folder: Path = FOLDER, *, requirements: Path = REQUIREMENTS) -> Path:
    """The Python of the environment, which is made where it is missing, or was made of other requirements.

    Raises:
        UserError: pip can't install them.
    """
    stamp, wanted = folder / "made-of", _wanted(requirements)
    with FileLock(Path(sys.prefix) / f"{folder.name}.lock"):  # of two commands one makes it
        if not stamp.is_file() or stamp.read_text() != wanted:
            print(f"making {folder.name}, once: lmms-eval and what it needs", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, requirements)
            stamp.write_text(wanted)
    return folder / "bin" / "python"
