"""Compiled programs kept on disk, so that the next run of the same shapes begins at once."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from pathlib import Path

import filelock
import jax

log = logging.getLogger(__name__)
SHORTEST_SECONDS = 0.3  # programs that compile faster are not kept
LOCK_SECONDS = 5.0  # for which another process is waited for


def keep_programs(limit_gib: float) -> Path | None:
    """Turns on jax's cache of compiled programs, in ``adaptax/programs`` in the user's cache folder.

    What was used longest ago goes first. A cache that ``JAX_COMPILATION_CACHE_DIR`` names is used as it is.

    Args:
      limit_gib: the most it may take; 0 turns it off.

    Returns:
      The folder; None without a cache, also where the folder cannot be written.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    folder = _open_folder() if limit_gib else None
    if folder:
        _remove_torn(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
    jax.config.update("jax_compilation_cache_max_size", int(limit_gib * 2**30))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _open_folder() -> Path | None:
    folder = default_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_ours = folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK)
    except OSError:
        is_ours = False
    if not is_ours:  # programs that others put there would be run
        log.warning("%s is not a folder of ours to write to: programs are compiled anew in every run", folder)
    return folder if is_ours else None


def _remove_torn(folder: Path) -> None:
    """Removes programs that a kill cut short: jax would not write them anew, and could make no room beside them."""
    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():  # it is written last
                program.unlink()
        for time in folder.glob("*-atime"):  # of a program whose removal was cut short
            if not time.with_name(time.name.removesuffix("-atime") + "-cache").exists():
                time.unlink()


def default_folder() -> Path:
    """``adaptax/programs/KIND``: programs for the CPU are made for what this kind of machine can do."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    return cache / "adaptax" / "programs" / kind
