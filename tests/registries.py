"""What the tests of registries share: files to register, and processes that use one at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from propolis.server.registry import Registry

KEY = "5a" * 32


def model_file(folder: Path, seed: int = 0, size: int = 100) -> Path:
    """A file of safetensors; another seed, another digest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model-{seed}-{size}.safetensors"
    path.write_bytes(save({"weight": np.random.default_rng(seed).normal(size=size)}))
    return path


def the_blobs(registry: Path) -> list[Path]:
    """The files that a registry in a folder keeps its models in."""
    return sorted((registry / "blobs").iterdir())


def content(registry: Registry, model: str, version: int | str) -> bytes:
    return b"".join(registry.read(registry.version(model, version)))


def in_processes(code: str, *arguments: object, count: int = 1) -> list[int]:
    """Run code that has the registry's module at hand in several processes at once; their exit codes."""
    imports = "import os, sys\nfrom pathlib import Path\nfrom propolis.server.registry import Registry\n"
    command = [sys.executable, "-c", imports + code, *map(str, arguments)]
    processes = [subprocess.Popen(command) for _ in range(count)]
    return [process.wait(timeout=120) for process in processes]
