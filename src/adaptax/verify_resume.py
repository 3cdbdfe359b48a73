"""``adaptax verify-resume``: a run that is stopped and resumed against one that is not, with the user's own keys.

Needs no jax itself: the runs are processes of their own, as a restart is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adaptax.config import UserError
from adaptax.manifest import Damaged, Manifest, list_checkpoints, read_checkpoint
from adaptax.run_folder import RunFolder

# What a proof does without: it saves at its ends alone, and draws nothing.
SPARE = ("checkpoint.every_steps=null", "checkpoint.every_minutes=null", "checkpoint.keep=1", "checkpoint.resume=auto")
SPARE += ("logging.tensorboard=false", "logging.plot=false", "logging.progress=lines", "training.exact_match_rows=0")


def verify_resume(overrides: Sequence[str], num_steps: int, stop_after: int) -> bool:
    """Trains ``num_steps`` straight, and in two processes one after the other, and prints the comparison.

    Args:
      overrides: the configuration, as on the command line.
      num_steps: steps in all; the run's schedule is that of the whole configuration.
      stop_after: steps before the stop.

    Returns:
      Whether every loss and every array is the same, bit for bit.

    Raises:
      UserError: the numbers of steps make no sense, or a run failed.
    """
    if not 0 < stop_after < num_steps:
        raise UserError(f"--at {stop_after} must lie between 0 and --steps {num_steps}")
    taken = [
        o
        for o in overrides
        if o.lstrip("+").startswith(("hydra.run.dir=", "checkpoint.resume=")) or o in ("-m", "--multirun")
    ]
    if taken:
        raise UserError(
            f"{taken[0]}: adaptax verify-resume runs one configuration, in folders of its own; leave it out"
        )
    with tempfile.TemporaryDirectory(prefix="adaptax-verify-") as place:
        straight, resumed = RunFolder(Path(place, "straight")), RunFolder(Path(place, "resumed"))
        _train(overrides, straight, num_steps, f"straight: {num_steps} steps")
        _train(overrides, resumed, stop_after, f"stopped:  {stop_after} steps")
        _train(overrides, resumed, num_steps - stop_after, f"resumed:  {num_steps - stop_after} steps")
        return compare_runs(straight, resumed, stop_after)


def _train(overrides: Sequence[str], folder: RunFolder, num_steps: int, words: str) -> None:
    started = time.monotonic()
    print(f"{words} ... ", end="", flush=True)
    command = [sys.executable, "-c", "from adaptax.cli import main; main()", "train", *overrides, *SPARE]
    command += [f"training.stop_after_steps={num_steps}", f"hydra.run.dir='{folder.path}'"]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if not lines:  # not what a user did: its traceback is all there is to go by
            print(done.stderr, end="", file=sys.stderr, flush=True)
        words = f"the run failed with exit code {done.returncode}; what it wrote stands above"
        raise UserError(lines[-1].removeprefix("error: ") if lines else words)


def compare_runs(straight: RunFolder, resumed: RunFolder, stop_after: int) -> bool:
    """Prints every loss and how many arrays are equal; returns whether all are."""
    losses = _read_losses(straight), _read_losses(resumed)
    table = Table(title=f"uninterrupted, and stopped after step {stop_after}")
    for column in ("step", "loss, straight", "loss, resumed", ""):
        table.add_column(column, justify="right")
    for key in sorted(losses[0].keys() | losses[1].keys()):
        pair = [values.get(key) for values in losses]
        words = "equal" if pair[0] == pair[1] else "DIFFERENT"
        name = f"{key[0]} (evaluation)" if key[1] == "eval_loss" else str(key[0])
        table.add_row(name, *(repr(value) for value in pair), words)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(table)
    ends = _read_end(straight), _read_end(resumed)
    if ends[0].step <= stop_after:
        raise UserError(f"the run has only {ends[0].step} steps: nothing is left after --at {stop_after}")
    digests = ends[0].digests, ends[1].digests
    wrong = sorted(
        name for name in digests[0].keys() | digests[1].keys() if digests[0].get(name) != digests[1].get(name)
    )
    is_same = losses[0] == losses[1] and not wrong and ends[0].progress == ends[1].progress
    console.print(
        f"after step {ends[0].step}: {len(digests[0]) - len(wrong)} of {len(digests[0])} arrays of adapters, optimizer "
        "and counters are equal bit for bit"
    )
    if wrong:
        console.print("different: " + ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    console.print("a resumed run is the uninterrupted run" if is_same else "A RESUMED RUN IS NOT THE UNINTERRUPTED RUN")
    return is_same


def _read_losses(folder: RunFolder) -> dict[tuple[int, str], float | None]:
    rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in ("train_loss", "eval_loss") if name in row}


def _read_end(folder: RunFolder) -> Manifest:
    try:
        return read_checkpoint(list_checkpoints(folder.checkpoints)[-1])
    except (Damaged, IndexError) as error:
        raise UserError(f"{folder.path} has no whole checkpoint: {error}") from None
