"""The machine that figures and runs hold for."""

import platform
import re
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def _in_cpuinfo(pattern: str) -> re.Match[str] | None:
    return re.search(pattern, CPUINFO.read_text(), re.MULTILINE) if CPUINFO.is_file() else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = _in_cpuinfo(r"^model name\s*: (.*)$")
    return found[1] if found else platform.processor()


def native_dtype() -> str:
    """ "bfloat16", or "float32" on a processor without instructions for bf16, which it takes several times as long for."""
    return (
        "bfloat16"
        if torch.cuda.is_available() or _in_cpuinfo(r"\b(avx512_bf16|amx_bf16|bf16)\b")
        else "float32"
    )
