"""What a figure was measured on, to be printed beside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch


def cpu() -> str:
    found = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), found)
    return found


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return f"{cpu()}, {os.cpu_count()} cores, {device}; Python {platform.python_version()}, torch {torch.__version__}"


def driver() -> str | None:
    """Return the version of the GPU's driver; None where there is no GPU, or it does not tell."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    return None


def facts(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a result is to be kept with; `packages` are named where they are installed."""
    gpu, versions = torch.cuda.is_available(), dict[str, str]()
    for package in ("hookloop", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {cpu()}", "gpu": gpu, "cpu": cpu(), "cores": os.cpu_count(),
        "driver": driver() if gpu else None, "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(), "torch": torch.__version__, "versions": versions,
    }  # fmt: skip


def header(found: dict[str, Any]) -> str:
    """Return the facts as one line."""
    gpu = f"{found['device']}, driver {found['driver']}, CUDA {found['cuda']}" if found["gpu"] else "no accelerator"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {found['cores']} cores, {gpu}; Python {found['python']}, torch {found['torch']}, {versions}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
