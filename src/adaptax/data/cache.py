"""Tokens kept on disk under the hash of all that they depend on; safe under concurrent runs, and bounded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / f"{key}.lock")
            if not _is_free(lock):
                log.info("waiting for another run that makes the same tokens of %s", name)
            with lock:
                store = self._open(key, name)
                return self._build(key, name, build) if store is None else store
        except OSError as error:
            log.warning(
                "tokens of %s are not kept: %s; data.cache_dir names another folder, data.cache=false keeps none",
                name,
                error,
            )
            return build_in_memory(name, build)

    def _open(self, key: str, name: str) -> TokenStore | None:
        folder = self.folder / key
        if not folder.exists():
            return None
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            if any((folder / f"{n}.bin").stat().st_size != meta["bytes"][n] for n in FIELDS):
                raise ValueError
            store = TokenStore(name, meta["format"], map_arrays(folder), Counts(**meta["counts"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            log.warning("tokens of %s in %s are damaged: they are made anew", name, folder)
            return None
        os.utime(folder / META)
        return store

    def _build(self, key: str, name: str, build: Build) -> TokenStore:
        partial, folder = self.folder / f"{key}.partial", self.folder / key
        for stale in (partial, folder):  # of a run that was killed, or damaged
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        writer = StoreWriter(partial)
        try:
            form, counts = build(writer)
            arrays = writer.finish()
            sizes = {n: arrays[n].nbytes for n in FIELDS}
            meta = {"name": name, "format": form, "bytes": sizes, "counts": dataclasses.asdict(counts)}
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
        except filelock.Timeout:
            return False
        return True


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
