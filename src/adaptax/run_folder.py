"""The folder of a run: what lies where in it, and who may write to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from adaptax.config import UserError


@dataclass(frozen=True)
class RunFolder:
    """Names of what a run writes."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration, every key."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A line per step and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """All that is needed to go on: ``step_N`` each."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter, written when a run comes to its end."""
        return self.path / "adapter"

    @property
    def adapters(self) -> Path:
        """``best`` and ``last``: the adapters of these checkpoints in PEFT's format."""
        return self.path / "adapters"

    @property
    def nonfinite(self) -> Path:
        """Batches whose loss or gradient was not finite."""
        return self.path / "nonfinite"

    @property
    def profile(self) -> Path:
        """Traces of steps, for TensorBoard and Perfetto."""
        return self.path / "profile"

    @property
    def summary(self) -> Path:
        """How the run ended; only there when it has."""
        return self.path / "summary.json"

    def is_used(self) -> bool:
        """Whether a run has begun here."""
        return self.metrics.exists() or self.checkpoints.exists()

    def read_summary(self) -> dict[str, Any] | None:
        """How the run ended, or None where it has not."""
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held while a run writes here; the system lets go of it when the process ends, however that is.

        Raises:
          UserError: another process holds it.
        """
        lock = filelock.FileLock(self.path / "run.lock", mode=0o644)
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"another run is at work in {self.path}: wait for it, or choose another hydra.run.dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written to: {error.strerror}; choose another hydra.run.dir"
            ) from None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Writes the configuration of a run that begins or goes on; it has not ended, or no more."""
        import yaml

        self.summary.unlink(missing_ok=True)
        write_text(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Says in one line that the disk is full, or cannot be written to.

        Raises:
          UserError: in place of the OSError.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            file = error.filename or f"a file of {self.path}"
            raise UserError(f"{file} cannot be written: {error.strerror}; make room, then start again") from None


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, and to the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
