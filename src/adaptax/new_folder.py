"""A folder of large files, written whole or not at all, and to the disk. Needs no jax."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from adaptax.config import UserError

log = logging.getLogger(__name__)
GIB = 1 << 30
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class WrittenFile:
    """A file as it was written."""

    name: str
    num_bytes: int
    sha256: str


def check_place(directory: Path, num_bytes: int) -> None:
    """Refuses a name that is taken, and a disk without room for so much.

    Raises:
      UserError: with what is needed and what there is.
    """
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists: choose another name, or remove it")
    disk = next(parent for parent in directory.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if free < num_bytes:
        sizes = f"{num_bytes / GIB:.3g} GiB, and {free / GIB:.3g} GiB are free there"
        raise UserError(f"{directory} takes {sizes}: make room, or choose another disk")


@contextlib.contextmanager
def made_whole(directory: Path) -> Iterator[Path]:
    """``NAME.partial`` to write to, which gets its name when all went well, and is removed when not.

    Raises:
      UserError: in place of an OSError, naming the file.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or partial} cannot be written: {error.strerror}") from None
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NewFile:
    """A file that is being written, and what is to be said of it."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._digest, self._num_bytes = hashlib.sha256(), 0

    def write(self, piece: bytes) -> None:
        """Appends a piece."""
        self._file.write(piece)
        self._digest.update(piece)
        self._num_bytes += len(piece)

    def describe(self) -> WrittenFile:
        """Name, size and hash of all that was written."""
        return WrittenFile(self._path.name, self._num_bytes, self._digest.hexdigest())


@contextlib.contextmanager
def open_new(path: Path) -> Iterator[NewFile]:
    """A file that is on the disk when it ends, and out of the system's memory: what reads it again reads the disk.

    Raises:
      UserError: in place of an OSError, naming the file.
    """
    try:
        with path.open("xb") as file:
            yield NewFile(path, file)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; make room, or choose another disk") from None


class Meter:
    """Lines of the log about work that takes long: how far, how fast, time left.

    Args:
      verb: what is done to bytes, such as ``merged``.
      total_bytes: that will be added.
    """

    def __init__(self, verb: str, total_bytes: int):
        self._verb, self._total, self._done = verb, total_bytes, 0
        self._started = self._told = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Counts what was done; says so now and then."""
        self._done, now = self._done + num_bytes, time.monotonic()
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told, speed = now, self._done / (now - self._started)
        left = int((self._total - self._done) / speed)
        sizes = f"{self._done / GIB:.1f} of {self._total / GIB:.1f} GiB"
        log.info("%s %s, %.0f MiB/s, %d:%02d left", self._verb, sizes, speed / 2**20, left // 60, left % 60)
