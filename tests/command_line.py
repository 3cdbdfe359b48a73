"""The product as a process, started from a folder of the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "run_training.py"

# Run by every Python that finds it on its path: tells at exit whether jax was imported.
WITNESS = """\
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path(__file__).with_name("witness").write_text(str("jax" in sys.modules)))
"""


@dataclass(frozen=True)
class Answer:
    """How a process ended."""

    code: int
    out: str
    err: str
    seconds: float
    imported_jax: bool


def start_process(home: Path, site: Path, *arguments: str) -> Answer:
    """Runs ``python run_training.py`` with these arguments; ``site`` holds the witness."""
    (site / "sitecustomize.py").write_text(WITNESS)
    (site / "witness").unlink(missing_ok=True)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=home,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    seconds = time.monotonic() - started
    return Answer(done.returncode, done.stdout, done.stderr, seconds, (site / "witness").read_text() == "True")
