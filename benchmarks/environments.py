"""Environments of the peers: made once, from PyPI, in the cache folder; reused as long as their packages are these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CACHE = Path.home() / ".cache" / "eft" / "bench"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

TORCH = "torch==2.13.0"
PACKAGES = {
    "transformers": ["transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "datasets==5.2.0"],
    "trl": ["transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "datasets==5.2.0", "trl==1.16.0"],
}
"""Packages of each peer's environment, beside torch."""
CUDA_PACKAGES = {"transformers": ["liger-kernel"], "trl": ["liger-kernel"]}
"""Further ones where the contest runs on an NVIDIA GPU."""


def environment_of(name: str, device: str) -> Path:
    """The Python of the peer `name`, installed where needed (a minute or two the first time)."""
    wanted = [TORCH, *PACKAGES[name], *(CUDA_PACKAGES[name] if device == "cuda" else [])]
    folder = CACHE / f"{name}-{device}"
    python, stamp = folder / "bin" / "python", folder / "packages.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"installing {', '.join(wanted)} into {folder} ...", flush=True)
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS]
    # On Linux PyPI's own wheel brings CUDA; the Makefile's TORCH_ARGS can name an index of smaller ones.
    subprocess.run([*install, *os.environ.get("TORCH_ARGS", "").split(), TORCH], check=True)
    subprocess.run([*install, *wanted], check=True)
    stamp.write_text(json.dumps(wanted))
    return python


def versions_of(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, without importing anything; packages that are missing are left out."""
    code = (
        "import json, sys; from importlib.metadata import version, PackageNotFoundError\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    output = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(output)
    return found
