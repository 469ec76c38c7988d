"""The machine that figures were measured on, in words."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """The processor, its cores, torch's version, and the system."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, {platform.system()}"


def machine_now() -> str:
    """The same, with what changes from run to run: Python, threads, load and date."""
    return (
        f"{machine()}, Python {platform.python_version()}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, {datetime.date.today().isoformat()}"
    )
