"""The product as a process, started from a folder of the user's own."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

SCRIPT = Path(__file__).parents[1] / "run_training.py"

# Run by every Python that finds it on its path: tells at exit whether jax was imported.
WITNESS = """\
import atexit, pathlib, sys
atexit.register(lambda: pathlib.Path(__file__).with_name("witness").write_text(str("jax" in sys.modules)))
"""


@dataclass(frozen=True)
class Called:
    """How a command ended that was called in this process."""

    code: int
    out: str
    err: str


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


def call(*arguments: str, stdin: str = "") -> Called:
    """``adaptax`` with these arguments in this process, which saves the seconds of a start."""
    from adaptax.cli import main

    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    code, handlers, level = 0, root.handlers[:], root.level
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")  # the command sets it, and these, for the whole process
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.setattr(logging, "raiseExceptions", True)
        patch.setattr(
            logging, "_handlerList", []
        )  # Hydra has logging close all there were: absl's closes pytest's file
        patch.setattr(ConfigLoaderImpl, "load_configuration", ConfigLoaderImpl.load_configuration)
        patch.setattr(sys, "argv", ["adaptax", *arguments])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
    return Called(code, out.getvalue(), err.getvalue())
