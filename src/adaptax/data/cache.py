"""Tokens kept on disk under the hash of all that they depend on; safe under concurrent runs, and bounded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from adaptax.data.store import FIELDS, Counts, StoreWriter, TokenStore, map_arrays

log = logging.getLogger(__name__)
META = "meta.json"
ENTRY = re.compile(r"[0-9a-f]{40}(\.partial)?")  # the latter while it is built
Build = Callable[[StoreWriter], tuple[str, Counts]]  # writes the rows, tells their format and counts


def fingerprint(parts: dict[str, Any]) -> str:
    """The hash of a JSON-like description, and of the code that makes tokens of rows."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    text = json.dumps(parts | {"code": code.hexdigest()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def default_folder() -> Path:
    """``adaptax/tokens`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptax" / "tokens"


class TokenCache:
    """Stores by fingerprint in a folder of at most ``limit_bytes``; what was used longest ago goes first."""

    def __init__(self, folder: Path, limit_bytes: float):
        self.folder, self._limit_bytes = folder, limit_bytes

    def get(self, key: str, name: str, build: Build) -> TokenStore:
        """The store of that key, built if it is not there; where the folder cannot be written, built in memory."""
        store = self._open(key)  # whole since it has its name, so a folder that only others may write serves too
        if store is not None:
            return replace(store, name=name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / f"{key}.lock")
            if not _is_free(lock):
                log.info("waiting for another run that makes the same tokens of %s", name)
            with lock:
                store = self._open(key)
                return self._build(key, name, build) if store is None else replace(store, name=name)
        except OSError as error:
            log.warning(
                "tokens of %s are not kept: %s; data.cache_dir names another folder, data.cache=false keeps none",
                name,
                error,
            )
            return build_in_memory(name, build)

    def _open(self, key: str) -> TokenStore | None:
        """The store under that key, if it is there and whole."""
        folder = self.folder / key
        if not folder.exists():
            return None
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if any(_checksum(folder / f"{n}.bin") != meta["checksums"][n] for n in FIELDS):
                raise ValueError
            store = TokenStore(meta["name"], meta["format"], map_arrays(folder), Counts(**meta["counts"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        with contextlib.suppress(OSError):  # another user's
            os.utime(folder / META)
        return store

    def _build(self, key: str, name: str, build: Build) -> TokenStore:
        partial, folder = self.folder / f"{key}.partial", self.folder / key
        if folder.exists():
            log.warning("tokens of %s in %s are damaged: they are made anew", name, folder)
        for stale in (partial, folder):  # of a run that was killed, or damaged
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        writer = StoreWriter(partial)
        try:
            form, counts = build(writer)
            writer.finish()
            checksums = {n: _checksum(partial / f"{n}.bin") for n in FIELDS}
            meta = {"name": name, "format": form, "checksums": checksums, "counts": dataclasses.asdict(counts)}
            (partial / META).write_text(json.dumps(meta), encoding="utf-8")
            partial.rename(folder)
        except BaseException:
            writer.close()
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._make_room(keep=key)
        return TokenStore(name, form, map_arrays(folder), counts)

    def _make_room(self, keep: str) -> None:
        """Deletes what runs that were killed left, and what was used longest ago; nothing else that lies there.

        A run that has an entry mapped keeps its bytes until it ends.
        """
        used, sizes = {}, {}
        for folder in self.folder.iterdir():
            if not ENTRY.fullmatch(folder.name):
                continue
            try:
                if folder.suffix or not (folder / META).exists():
                    self._delete(folder)
                    continue
                used[folder] = (folder / META).stat().st_mtime
                sizes[folder] = sum(file.stat().st_size for file in folder.iterdir())
            except OSError:  # another run deletes it just now
                continue
        total = sum(sizes.values())
        for folder in sorted(sizes, key=lambda f: used[f]):
            if total <= self._limit_bytes:
                break
            if folder.name != keep and self._delete(folder):
                total -= sizes[folder]

    def _delete(self, folder: Path) -> bool:
        """Whether it is gone; what another run opens or builds just now stays."""
        try:
            with filelock.FileLock(self.folder / f"{folder.stem}.lock").acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (filelock.Timeout, OSError):  # the latter: it is another user's
            return False
        return True


def _checksum(path: Path) -> list[int]:
    """Length and CRC-32 of a file, read in blocks."""
    length = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            length, checksum = length + len(block), zlib.crc32(block, checksum)
    return [length, checksum]


def build_in_memory(name: str, build: Build) -> TokenStore:
    """The store, kept nowhere."""
    writer = StoreWriter(None)
    form, counts = build(writer)
    return TokenStore(name, form, writer.finish(), counts)


def _is_free(lock: filelock.BaseFileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return True
    except filelock.Timeout:
        return False
