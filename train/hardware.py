"""The machine and the code that a run or a measurement belongs to: commit, versions, hardware."""

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from data.paths import ROOT

CPUINFO = Path("/proc/cpuinfo")

# Names of the instructions for bf16, on x86 and on ARM.
BF16_FLAGS = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")


@dataclass(frozen=True)
class Environment:
    """What a result was computed with.

    Attributes:
        date: today, as 2025-12-31.
        commit: hash of the repository's commit; None without git or outside of a repository.
        modified_files: lines of `git status --porcelain`, untracked files among them.
        python: version of Python.
        torch: version of torch.
        device: name of the GPU or processor.
        num_cpus: cores of the machine.
    """

    date: str
    commit: str | None
    modified_files: list[str]
    python: str
    torch: str
    device: str
    num_cpus: int | None

    @property
    def short_commit(self) -> str:
        """The commit in 7 digits, "-dirty" if tracked files differ from it; or "unknown"."""
        if self.commit is None:
            return "unknown"

        # Untracked files ("??") don't change what the commit computes.
        is_dirty = any(not line.startswith("??") for line in self.modified_files)
        return self.commit[:7] + ("-dirty" if is_dirty else "")


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the repository; None if it fails or git is missing."""
    # -C, because a command may be started in any folder.
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None


def current_commit() -> str | None:
    """Return the hash of the repository's commit; None without git or outside of a repository."""
    return _git("rev-parse", "HEAD")


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def current_environment(device: torch.device) -> Environment:
    """Record the commit, the versions and the hardware that this process runs on."""
    modified_files = _git("status", "--porcelain") or ""
    return Environment(
        date=datetime.date.today().isoformat(),
        commit=current_commit(),
        modified_files=modified_files.splitlines(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=device_name(device),
        num_cpus=os.cpu_count(),
    )


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)

    # Linux knows the model of the processor. `platform` often knows only its architecture.
    model = re.search(r"^model name\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    return model[1] if model else platform.processor()


def native_dtype() -> str:
    """Return the default precision of the frozen weights: "bfloat16" or "float32".

    A processor without instructions for bf16 takes several times longer in bf16 than in float32.
    """
    has_bf16 = torch.cuda.is_available() or BF16_FLAGS.search(_cpuinfo()) is not None
    return "bfloat16" if has_bf16 else "float32"


def _cpuinfo() -> str:
    """Return Linux's description of the processor; empty on other systems."""
    return CPUINFO.read_text() if CPUINFO.is_file() else ""
