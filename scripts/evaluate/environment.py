"""Make `.venv-eval`, the environment of lmms-eval, on top of the packages of the running Python.

lmms-eval pins packages that the recipe needs in other versions, so it is not installed into
`.venv`. torch, transformers and vzip come from `.venv`. So a model answers exactly as it did after
tuning, and nothing large is installed twice.
"""

import sys
import sysconfig
from pathlib import Path

from data.paths import ROOT
from scripts.common.environment import make_environment, run_pip

FOLDER = ROOT / ".venv-eval"
REQUIREMENTS = ROOT / "requirements-eval.txt"
PATH_FILE = "beneath.pth"
"""File that adds the packages of the running Python to the environment."""


def _own_packages() -> list[str]:
    """List the folders with the packages of the running Python."""
    # Debian's Python calls its folder dist-packages.
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _add_own_packages(folder: Path) -> None:
    """Let the environment see the packages of the running Python, behind its own."""
    variables = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=variables))

    # Python reads .pth files after the folder itself, so the environment's own packages come first.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in _own_packages()]
    (packages / PATH_FILE).write_text("".join(lines))


def eval_python(folder: Path = FOLDER, *, requirements: Path = REQUIREMENTS) -> Path:
    """Return the environment's Python.

    Make the environment first if it is missing, or was made from other requirements.

    Raises:
        UserError: pip can't install the requirements.
    """

    def fill(python: Path) -> None:
        _add_own_packages(folder)

        # --no-deps: the list is complete, and lmms-eval's own pins contradict the packages of .venv.
        run_pip(
            python,
            "install",
            "--no-deps",
            "--requirement",
            str(requirements),
            package="lmms-eval",
        )

    return make_environment(
        folder,
        holds="lmms-eval and the packages it needs",
        ingredients=[requirements.read_text(), *_own_packages()],
        fill=fill,
    )
