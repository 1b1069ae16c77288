"""What a measurement ran on, in one line."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe_processor() -> str:
    """Such as `2-core CPU, AMD EPYC, x86_64 (AVX-512)`: usable cores, the name the system gives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        name = fields.get("model name", name)
        flags = " (AVX-512)" if "avx512f" in fields.get("flags", "") else ""
    return ", ".join(part for part in (f"{cores}-core CPU", name, platform.machine() + flags) if part)
