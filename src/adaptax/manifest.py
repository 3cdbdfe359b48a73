"""What a checkpoint says of itself, and whether it is whole. Needs no jax.

``checkpoints/step_00000100/`` holds ``arrays/``, written by Orbax, then ``manifest.json`` (the step, the configuration,
what the run was about, a digest of every array) and ``SHA256SUMS`` of all files. It is made under the name
``step_00000100.partial`` and renamed, so what has its name is complete, and what then fails a check was damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptax.run_folder import write_text

FORMAT = 1
ARRAYS, FILE, SUMS = "arrays", "manifest.json", "SHA256SUMS"
_NAME = re.compile(r"step_(\d{8,})")
_SUMS = re.compile(r"(?:[0-9a-f]{64}  .+\n)+")
_STALE = re.compile(r"step_\d{8,}\.(partial|deleted|replaced)")


class Damaged(Exception):
    """Why a checkpoint cannot be used."""


@dataclass(frozen=True)
class Manifest:
    """All of a checkpoint but its arrays."""

    step: int
    saved_at: str  # UTC
    progress: dict[str, Any]  # adaptax.progress.Progress
    config: dict[str, Any]
    identity: dict[str, Any]  # what the run trains: base weights, tokenizer, data; and with what
    digests: dict[str, str]  # array -> digest


def seal(path: Path, manifest: Manifest) -> None:
    """Makes a folder with ``arrays`` a checkpoint: writes its manifest, then the hashes of all files."""
    write_text(path / FILE, json.dumps({"format": FORMAT} | dataclasses.asdict(manifest), indent=1) + "\n")
    write_text(path / SUMS, _format_sums(_hash_files(path)))


def name_step(step: int) -> str:
    """The name of a step's folder."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None where it is no such name."""
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else None
    return step if step is not None and name_step(step) == path.name else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, damaged ones too, oldest first."""
    found = {path: step for path in folder.glob("step_*") if (step := step_of(path)) is not None and path.is_dir()}
    return sorted(found, key=lambda path: found[path])


def clean_up(folder: Path) -> None:
    """Removes what a run that was killed had begun to write or to delete; what it had put aside comes back."""
    for path in folder.glob("step_*"):
        if not _STALE.fullmatch(path.name):
            continue
        if path.suffix == ".replaced" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        else:
            shutil.rmtree(path, ignore_errors=True)


def publish(partial: Path) -> Path:
    """Gives a sealed checkpoint its name; one of the same step makes room. Returns its path."""
    path = partial.with_suffix("")
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def delete_checkpoint(path: Path) -> None:
    """Deletes a checkpoint: gone at once, even where deleting its files is cut short."""
    doomed = path.with_name(path.name + ".deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_checkpoint(path: Path) -> Manifest:
    """The manifest of a checkpoint, of which every file was found to be as it was written.

    Raises:
      Damaged: naming what is missing or changed.
    """
    try:
        sums = (path / SUMS).read_text(encoding="utf-8")
        found = _hash_files(path)
    except FileNotFoundError:
        raise Damaged(f"{SUMS} is missing" if path.is_dir() else "it is missing") from None
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Damaged(f"{SUMS} is not what was written") from None
    if sums != _format_sums(found):
        raise Damaged(_describe_change(sums, found))
    return _read_manifest(path)


def _hash_files(path: Path) -> dict[str, str]:
    """File below a checkpoint's folder -> SHA-256. Hidden files, which systems leave behind, are none of its own."""
    hashes = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            raise Damaged(f"{name} is a link")
        if file.is_file() and name != SUMS and not file.name.startswith("."):
            with file.open("rb") as opened:
                hashes[name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes


def _format_sums(hashes: dict[str, str]) -> str:
    """As ``sha256sum --check`` reads it."""
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items())


def _describe_change(sums: str, found: dict[str, str]) -> str:
    written = {name: digest for digest, _, name in (line.partition("  ") for line in sums.splitlines())}
    if FILE not in written or not _SUMS.fullmatch(sums):  # it is cut short
        return f"{SUMS} is not what was written"
    changed = [name for name, digest in found.items() if written.get(name, digest) != digest]
    if changed:
        return f"{changed[0]} is not what was written"
    missing = [name for name in written if name not in found]
    if missing:
        return f"{missing[0]} is missing"
    added = [name for name in found if name not in written]
    return f"{added[0]} is none of its files" if added else f"{SUMS} is not what was written"


def _read_manifest(path: Path) -> Manifest:
    """The manifest, whose bytes are known to be those that were written: by this version, or another one."""
    try:
        values = json.loads((path / FILE).read_text(encoding="utf-8"))
        form = values.pop("format")
        if form != FORMAT:
            raise Damaged(f"it was written by another version of adaptax (format {form}, this one reads {FORMAT})")
        manifest = Manifest(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{FILE} is not a manifest") from None
    if manifest.step != step_of(path):
        raise Damaged(f"its {FILE} is of step {manifest.step}")
    return manifest
