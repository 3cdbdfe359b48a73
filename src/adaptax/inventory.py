"""The checkpoints of a run, and whether each is whole. Needs no jax."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptax.config import UserError
from adaptax.manifest import Damaged, Manifest, list_checkpoints, read_checkpoint
from adaptax.run_folder import RunFolder

MIB = 2**20
NUMBERS = ("MiB", "training loss", "evaluation loss")


def show_checkpoints(path: Path) -> bool:
    """Prints the checkpoints of a run's folder; returns whether all are whole.

    Raises:
      UserError: there is no such folder, or no checkpoint in it.
    """
    folder = RunFolder(path)
    paths = list_checkpoints(folder.checkpoints)
    if not paths:
        what = "has no checkpoints" if folder.is_used() else "is no run's folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"{path} {what}: adaptax checkpoints RUN wants the folder of a run, such as outputs/NAME/DATE/TIME"
        )
    table = Table(title=Text(str(path)))
    for column in ("checkpoint", "saved (UTC)", "MiB", "training loss", "evaluation loss", "state"):
        table.add_column(
            column, justify="right" if column in NUMBERS else "left", no_wrap=column != "state", overflow="fold"
        )
    states: list[Manifest | Damaged] = []
    for checkpoint in paths:
        try:
            states.append(read_checkpoint(checkpoint))
        except Damaged as error:
            states.append(error)
    good = [state for state in states if isinstance(state, Manifest)]
    best_step = good[-1].progress.get("best_step") if good else None
    for checkpoint, state in zip(paths, states, strict=True):
        size = f"{sum(file.stat().st_size for file in checkpoint.rglob('*') if file.is_file()) / MIB:.1f}"
        if isinstance(state, Damaged):
            table.add_row(checkpoint.name, "", size, "", "", Text(f"damaged: {state}", style="red"))
            continue
        marks = ["good"] + ["best"] * (state.step == best_step) + ["resumed from"] * (state is good[-1])
        progress = state.progress
        eval_loss = progress["eval_loss"] if progress["eval_step"] == state.step else None
        losses = (_show(progress["train_loss"]), _show(eval_loss))
        table.add_row(checkpoint.name, state.saved_at.removesuffix("+00:00"), size, *losses, ", ".join(marks))
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(table)
    return len(good) == len(paths)


def _show(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
