"""What a run writes down: ``metrics.jsonl``, TensorBoard events, ``loss.png``, a progress bar or lines."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from adaptax.config import LoggingConfig
from adaptax.run_folder import write_text

log = logging.getLogger(__name__)
METRICS, LOG_SCALE_RATIO = "metrics.jsonl", 20
MIN_STALL = 0.05  # the share of the time waiting for input that is worth a word


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and, if asked for, to TensorBoard; draws ``loss.png`` at the end.

    Close it on every path; without a directory it writes nothing (the other processes of a run).

    Args:
      directory: of the run.
      config: what to write and draw.
      earlier: rows from before a resume, which stay.
    """

    def __init__(self, directory: Path | None, config: LoggingConfig, earlier: Sequence[Mapping[str, Any]] = ()):
        self._directory, self._config = directory, config
        self._rows: list[Mapping[str, Any]] = list(earlier)
        self._file, self._events = None, None
        if directory:
            write_text(directory / METRICS, "".join(json.dumps(row) + "\n" for row in self._rows))
            self._file = Appender(directory / METRICS)
        if directory and config.tensorboard:
            self._events = EventLog(directory / "tensorboard", earlier[-1]["step"] + 1 if earlier else None)

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """One row: the step and its values; a value that is not finite is written as null."""
        row = {"step": step} | {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}
        self._rows.append(row)
        if self._file:
            self._file.write((json.dumps(row) + "\n").encode())
        if self._events:
            self._events.write(step, {name: row[name] for name in values if row[name] is not None})

    def write_text(self, step: int, tag: str, text: str) -> None:
        """A text for TensorBoard, if it is asked for."""
        if self._events:
            self._events.write_text(step, tag, text)

    def close(self) -> None:
        """Flushes everything and draws the picture."""
        for file in (self._file, self._events):
            if file:
                file.close()
        try:
            if self._directory and self._config.plot:
                draw_losses(self._rows, self._directory / "loss.png")
        except OSError as error:
            log.warning("%s: the picture of the losses is not written: %s", self._directory, error.strerror)


class Appender:
    """A file to append to. A disk that is full does not end a run: what could not be written waits for the next time.

    Nothing is held back: what is written is there for other programs, and after a kill.
    """

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)
        self._unwritten, self._is_told = b"", False

    def write(self, piece: bytes) -> None:
        """Appends a piece and those that wait, or takes back what was written of them."""
        self._unwritten += piece
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(self._unwritten) != len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._unwritten, self._is_told = b"", False
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            if not self._is_told:
                log.warning("%s: %s; what is to be written waits until it can be", self._file.name, error.strerror)
            self._is_told = True

    def close(self) -> None:
        """Writes what still waits, if it can be."""
        self.write(b"")
        with contextlib.suppress(OSError):  # of disks in networks
            self._file.close()


class EventLog:
    """Scalars and texts for TensorBoard.

    tensorboardX's own writer is left aside: where the disk is full its thread ends, and the training waits for ever.

    Args:
      folder: of the events; may hold those of earlier starts.
      first_step: of a resume; what earlier starts wrote from there on is not shown.
    """

    def __init__(self, folder: Path, first_step: int | None):
        with _left_out("torch"):  # tensorboardX loads it where it is installed: seconds, and of no use here
            from tensorboardX import record_writer
            from tensorboardX.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._tensors: Any = tensor_pb2
        self._shapes: Any = tensor_shape_pb2
        self._checksum = record_writer.masked_crc32c
        folder.mkdir(exist_ok=True)
        self._file = Appender(folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}")
        self._append(file_version="brain.Event:2")
        if first_step is not None:
            self._append(step=first_step, session_log=self._events.SessionLog(status=1))  # it has started

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """The values of a step; ``train_loss`` becomes ``train/loss``."""
        make = self._summaries.Summary
        scalars = [make.Value(tag=name.replace("_", "/", 1), simple_value=value) for name, value in values.items()]
        self._append(step=step, summary=make(value=scalars))

    def write_text(self, step: int, tag: str, text: str) -> None:
        """A text of a step, which TensorBoard shows as Markdown: as it stands, in a block of code."""
        make, block = self._summaries.Summary, "".join(f"    {line}\n" for line in text.splitlines())
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name="text")
        shape = self._shapes.TensorShapeProto(dim=[self._shapes.TensorShapeProto.Dim(size=1)])
        tensor = self._tensors.TensorProto(dtype="DT_STRING", string_val=[block.encode()], tensor_shape=shape)
        value = make.Value(tag=tag, metadata=self._summaries.SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self._append(step=step, summary=make(value=[value]))

    def close(self) -> None:
        """Writes what still waits, if it can be."""
        self._file.close()

    def _append(self, **fields: Any) -> None:
        data = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        header = struct.pack("<Q", len(data))
        self._file.write(b"".join(part + struct.pack("<I", self._checksum(part)) for part in (header, data)))


@contextlib.contextmanager
def _left_out(module: str) -> Iterator[None]:
    """Imports within find no such module, unless it is loaded already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def read_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` up to a step, but for what is written when a run has ended.

    A line that was cut short, or is none of ours, is left out.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            if row["step"] <= last_step and "eval_exact_match" not in row:
                rows.append(row)
    return rows


def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and evaluation loss over the steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (("train_loss", "train", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3, which="both")
    losses = [row[name] for row in rows for name in ("train_loss", "eval_loss") if row.get(name)]
    if losses and max(losses) > LOG_SCALE_RATIO * min(losses):
        axes.set_yscale("log")  # else all but the first steps would lie on the axis
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


class ProgressDisplay:
    """A bar in a terminal, else log lines: loss, learning rate, trained tokens/s, padding, time left.

    Also MFU where the devices' peak is known, and the share of the time spent waiting for input where that is much.
    """

    def __init__(self, config: LoggingConfig, num_steps: int, is_shown: bool):
        mode = config.progress
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self._mode = mode if is_shown else "off"
        self._every, self._num_steps = config.every_steps, num_steps
        self._started = time.monotonic()
        self._first_step: int | None = None
        self._bar: Progress | None = None

    def __enter__(self) -> ProgressDisplay:
        if self._mode == "bar":
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("compiling", total=self._num_steps)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            with contextlib.suppress(OSError):  # the terminal may have been closed
                self._bar.stop()

    def update(self, step: int, values: Mapping[str, float | None]) -> None:
        """Shows a finished step (counted from 1)."""
        if self._first_step is None:
            self._first_step, self._started = step, time.monotonic()
        text = describe_step(values)
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self._mode == "lines" and (step == 1 or step % self._every == 0 or step == self._num_steps):
            log.info("step %d/%d  %s  %s left", step, self._num_steps, text, self._time_left(step))

    def _time_left(self, step: int) -> str:
        done = step - (self._first_step or 0)
        if done <= 0:
            return "?"
        seconds = (time.monotonic() - self._started) / done * (self._num_steps - step)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


def describe_step(values: Mapping[str, float | None]) -> str:
    """What a line of the log, or the bar, says of a step's row."""
    text = (
        f"loss {values['train_loss']:.4f}  lr {values['train_learning_rate']:.2e}  "
        f"{values['train_tokens_per_second']:,.0f} trained tok/s  padding {values['train_padding_share']:.0%}"
    )
    mfu, stall = values.get("train_mfu"), values.get("train_input_stall_share")
    text += f"  MFU {mfu:.1%}" if mfu is not None else ""
    return text + (f"  waiting for input {stall:.0%}" if stall is not None and stall >= MIN_STALL else "")
