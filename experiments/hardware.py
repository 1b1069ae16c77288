"""The machine under a measurement: its processor, cores, GPUs, memory and library versions."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers() -> int:
    """Processes that may run at once: one per GPU, or one per core where there is none."""
    import torch

    return torch.cuda.device_count() or cores()


def gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


def describe_processor() -> str:
    """Such as `2-core CPU, AMD EPYC, x86_64 (AVX-512)`: usable cores and the system's name for the processor."""
    name, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        name = fields.get("model name", name)
        flags = " (AVX-512)" if "avx512f" in fields.get("flags", "") else ""
    return ", ".join(part for part in (f"{cores()}-core CPU", name, platform.machine() + flags) if part)


def describe_gpu() -> str | None:
    """Such as `NVIDIA H100 80GB HBM3 (79 GiB), driver 580.1, CUDA 13.0`, the GPU that torch uses first; or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    driver = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        driver = lines[0] if lines else None
    parts = [f"{found.name} ({found.total_memory / 2**30:.0f} GiB)", f"driver {driver}" if driver else ""]
    return ", ".join(part for part in (*parts, f"CUDA {torch.version.cuda}") if part)


@functools.cache
def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def provenance() -> dict[str, Any]:
    """Commit, versions, processor and GPUs, as JSON values."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    libraries = {"python": platform.python_version(), **versions("torch", "transformers", "peft", "numpy")}
    return {"commit": commit(), "versions": libraries, "processor": describe_processor(), "gpus": gpus}


def versions(*libraries: str) -> dict[str, str]:
    """The versions of these libraries, without those that are not installed."""
    found = {}
    for library in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
