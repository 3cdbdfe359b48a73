"""Merged checkpoints: the base with its adapters added, as Hugging Face files, read again after writing.

Tensors pass from file to file in pieces: host memory holds a few of these and the adapters, however large the model is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptax.config import UserError
from adaptax.lora import LoraSpec
from adaptax.models import Architecture, Family
from adaptax.models.hub import CARRIED_FILES
from adaptax.new_folder import GIB, Meter, WrittenFile, check_place, made_whole, open_new
from adaptax.tensor_files import DTYPES, StoredTensor, list_tensors, read_pieces
from adaptax.weights import check_tensors

log = logging.getLogger(__name__)
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Change:
    """How far a merged matrix W' is from the base's W, both as they are stored."""

    largest: float  # of |W' - W|
    relative: float  # norm of W' - W by that of W; infinite where W is zero


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor as it was computed."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    sha256: str  # of its bytes


@dataclass(frozen=True)
class MergeReport:
    """What a merged checkpoint is made of."""

    changes: Mapping[str, Change]  # of every merged module, by the name of its tensor
    tensors: Mapping[str, WrittenTensor]  # all, by name
    files: tuple[WrittenFile, ...]

    @property
    def num_merged(self) -> int:
        """Modules with an adapter, as checkpoints count them: keys and values are two."""
        return len(self.changes)

    @property
    def num_carried(self) -> int:
        """Tensors that are the base's, byte for byte."""
        return len(self.tensors) - len(self.changes)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What merged modules are stored as: ``BF16``, ``F16`` or ``F32``; one, unless the base mixes them."""
        return tuple(sorted({self.tensors[name].dtype for name in self.changes}))

    @property
    def largest_change(self) -> float:
        """Of any weight."""
        return max((change.largest for change in self.changes.values()), default=0.0)

    @property
    def largest_relative_change(self) -> float:
        """Of any module, by its norm."""
        return max((change.relative for change in self.changes.values()), default=0.0)

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Merged modules that are what they were: their B is zero, or the update was lost in rounding."""
        return tuple(name for name, change in self.changes.items() if change.largest == 0)


def save_merged(
    directory: Path,
    base_directory: Path,
    adapters: Mapping[str, np.ndarray],
    spec: LoraSpec,
    family: Family,
    arch: Architecture,
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> MergeReport:
    """Writes the base with its adapters added, whole or not at all, and reads it again.

    An adapted matrix is W + scale (A B), computed in float32 and rounded once, to the type that W is stored in. All
    other tensors, a vision tower too, are carried over byte for byte. Names are those of the base; a second copy of the
    tied head is left out. After a run with ``model.quantization`` too, the adapters are added to the base as it is
    stored, not to the values that its steps computed with, which are rounded to 8 or 4 bits.

    Args:
      directory: must not exist; until all is checked, it is ``NAME.partial``.
      base_directory: the base's checkpoint, fetched with ``hub.EXPORT_FILES`` where it comes from the hub.
      adapters: path -> stacked float32 array, on the host.
      spec: the adapted layers, ranks and scales.
      family: the model family.
      arch: the model's numbers.
      max_shard_bytes: of tensors in a file, unless one alone is larger.

    Raises:
      UserError: the base is not this model, there is no room, a file cannot be written, or is not what was written.
    """
    source = list_tensors(base_directory)
    prefix = check_tensors(base_directory, source, arch, family.checkpoint)
    kept = {name: tensor for name, tensor in source.items() if not family.checkpoint.is_tied_head(name)}
    updates = _find_updates(adapters, spec, family, arch, prefix)
    copied = _find_carried(base_directory)
    shards = _lay_out(kept, max_shard_bytes)
    num_bytes = sum(shard.num_bytes for shard in shards)
    check_place(directory, num_bytes + sum(path.stat().st_size for path in copied))
    log.info("merging %d modules into %s, %.3g GiB", len(updates), directory, num_bytes / GIB)
    meter, changes, tensors = Meter("merged", num_bytes), {}, {}
    with made_whole(directory) as partial:
        files = [_write_shard(partial, shard, updates, changes, tensors, meter) for shard in shards]
        if len(shards) > 1:
            files.append(_write_index(partial, shards))
        for path in copied:
            with open_new(partial / path.name) as file:
                for piece in read_pieces(path, 0, path.stat().st_size):
                    file.write(piece)
            files.append(file.describe())
        report = MergeReport(changes, tensors, tuple(files))
        _check_complete(report, kept, spec, family)
        check_merged(partial, report)
    return report


def add_adapters(base: dict[str, Any], adapters: Mapping[str, np.ndarray], spec: LoraSpec) -> dict[str, np.ndarray]:
    """The same sum of the stacked arrays of a base, on the host; they are taken out of ``base`` one after the other."""
    merged = {}
    for path in list(base):
        array = base.pop(path)
        kind = path.removeprefix("layers/").removesuffix("/w")
        merged[path] = np.array(array) if kind in spec.layers else np.asarray(array)
        for place, layer in enumerate(spec.layers.get(kind, ())):
            rank, weight = spec.rank_of(kind, layer), merged[path][layer]
            a_IR, b_RO = (adapters[f"layers/{kind}/w_lora_{side}"][place] for side in "ab")
            with np.errstate(all="ignore"):  # what overflows is told below
                update = np.float32(spec.scale_of(kind, layer)) * (a_IR[:, :rank] @ b_RO[:rank])
                merged[path][layer] = weight.astype(np.float32) + update.reshape(weight.shape)
            if not np.isfinite(merged[path][layer]).all():
                raise UserError(
                    f"layers/{layer}/{kind} has values that are not finite once its adapter is added: the base or the "
                    f"adapter is damaged, or {weight.dtype} cannot hold them"
                )
    return merged


def check_merged(directory: Path, report: MergeReport) -> None:
    """Reads a merged checkpoint again, from the disk: every file and every tensor must be what the report says.

    Raises:
      UserError: naming the first that is not.
    """
    cause = "it was changed, or the disk or the memory of this machine fails"
    found = {path.name for path in directory.iterdir()}
    for name in sorted(found ^ {file.name for file in report.files}):
        raise UserError(f"{directory / name} {'was not written' if name in found else 'is missing'}: {cause}")
    tensors = list_tensors(directory)
    for name in sorted(tensors.keys() ^ report.tensors.keys()):
        raise UserError(f"{directory}: {name:.200} {'was not written' if name in tensors else 'is missing'}: {cause}")
    meter = Meter("checked", sum(file.num_bytes for file in report.files))
    for file in report.files:
        path, whole = directory / file.name, hashlib.sha256()
        inside = {name: tensor for name, tensor in tensors.items() if tensor.path.name == file.name}
        start = min((tensor.offset for tensor in inside.values()), default=file.num_bytes)
        _feed(read_pieces(path, 0, start), meter, whole)  # its header, or all of it
        for name, tensor in sorted(inside.items(), key=lambda item: item[1].offset):
            alone, said = hashlib.sha256(), report.tensors[name]
            _feed(tensor.read(), meter, whole, alone)
            if WrittenTensor(tensor.shape, tensor.dtype, alone.hexdigest()) != said:
                raise UserError(f"{path}: {name} is not what was computed: {cause}")
        if path.stat().st_size != file.num_bytes or whole.hexdigest() != file.sha256:
            raise UserError(f"{path} is not what was written: {cause}")


def _feed(pieces: Iterator[bytes], meter: Meter, *hashes: Any) -> None:
    for piece in pieces:
        for taken in hashes:
            taken.update(piece)
        meter.add(len(piece))


def _check_complete(report: MergeReport, kept: Mapping[str, StoredTensor], spec: LoraSpec, family: Family) -> None:
    """Nothing of the base is missing, nothing is of another shape, and every adapter was added."""
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()}
    if {name: (tensor.shape, tensor.dtype) for name, tensor in report.tensors.items()} != expected:
        raise UserError("the merged checkpoint does not have the tensors of its base; nothing was written")
    num_modules = sum(
        len(layers) * len(family.checkpoint.LINEARS[kind].tensors) for kind, layers in spec.layers.items()
    )
    if report.num_merged != num_modules:
        raise UserError(f"{report.num_merged} modules were merged, and {num_modules} are adapted; nothing was written")


# What is computed


@dataclass(frozen=True)
class _Update:
    """What is added to a matrix [out, in]."""

    a_IR: np.ndarray
    b_RO: np.ndarray
    scale: float

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some of its rows, [rows, in], in float32."""
        update = self.b_RO[:, start:stop].T @ self.a_IR.T
        update *= self.scale
        return update


def _find_updates(
    adapters: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture, prefix: str
) -> dict[str, _Update]:
    """Tensor name -> what is added to it."""
    updates = {}
    for kind, layers in spec.layers.items():
        names = family.checkpoint.tensor_names(f"layers/{kind}/w", arch, prefix)
        a_LIR, b_LRO = (np.asarray(adapters[f"layers/{kind}/w_lora_{side}"], np.float32) for side in "ab")
        assert len(a_LIR) == len(b_LRO) == len(layers), f"{kind} is adapted in {len(layers)} layers"
        for place, layer in enumerate(layers):
            rank = spec.rank_of(kind, layer)
            b_RCO = b_LRO[place, :rank].reshape(rank, len(names[layer]), -1)
            for part, name in enumerate(names[layer]):
                updates[name] = _Update(a_LIR[place, :, :rank], b_RCO[:, part], spec.scale_of(kind, layer))
    return updates


def _merge(name: str, tensor: StoredTensor, update: _Update, changes: dict[str, Change]) -> Iterator[bytes]:
    """The bytes of a merged matrix, in pieces; its change is known after the last one."""
    dtype, num_in = DTYPES[tensor.dtype], tensor.shape[1]
    largest = squares = base_squares = 0.0
    row = 0
    for piece in tensor.read():
        weight = np.frombuffer(piece, dtype).reshape(-1, num_in).astype(np.float32, copy=False)
        with np.errstate(all="ignore"):  # what overflows is told below
            merged = (weight + update.rows(row, row + len(weight))).astype(dtype)
            change = merged.astype(np.float32) - weight
        row += len(weight)
        largest = max(float(np.abs(change).max()), largest)  # NaN wins where it comes first
        if not math.isfinite(largest):
            raise UserError(
                f"{tensor.path}: {name} has values that are not finite once its adapter is added: the base or the "
                f"adapter is damaged, or {tensor.dtype} cannot hold them"
            )
        squares += float(np.vdot(change, change))
        base_squares += float(np.vdot(weight, weight))
        yield merged.tobytes()
    changes[name] = Change(largest, math.sqrt(squares / base_squares) if base_squares else math.inf if squares else 0.0)


# What is written


@dataclass(frozen=True)
class _Shard:
    """A safetensors file to be: its header and, in their order, its tensors."""

    name: str
    header: bytes
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors.values())


def _lay_out(tensors: Mapping[str, StoredTensor], max_shard_bytes: int) -> list[_Shard]:
    """Tensors in the base's order, so that it is read in that order too; a new file wherever one is full."""
    groups: list[dict[str, StoredTensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if groups[-1] and num_bytes + tensor.num_bytes > max_shard_bytes:
            groups.append({})
            num_bytes = 0
        groups[-1][name] = tensor
        num_bytes += tensor.num_bytes
    numbered = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    shards = []
    for file, group in zip(numbered if len(groups) > 1 else ["model.safetensors"], groups, strict=True):
        # Wide types first, which keeps all of them aligned.
        width = {name: tensor.num_bytes // max(1, math.prod(tensor.shape)) for name, tensor in group.items()}
        ordered = {name: group[name] for name in sorted(group, key=lambda name, width=width: -width[name])}
        shards.append(_Shard(file, _format_header(ordered), ordered))
    return shards


def _format_header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """As https://github.com/huggingface/safetensors#format tells."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    directory: Path,
    shard: _Shard,
    updates: Mapping[str, _Update],
    changes: dict[str, Change],
    tensors: dict[str, WrittenTensor],
    meter: Meter,
) -> WrittenFile:
    """Merges and writes the tensors of a file; adds to what is known of modules and tensors."""
    with open_new(directory / shard.name) as file:
        file.write(shard.header)
        for name, tensor in shard.tensors.items():
            digest = hashlib.sha256()
            pieces = _merge(name, tensor, updates[name], changes) if name in updates else tensor.read()
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
                meter.add(len(piece))
            tensors[name] = WrittenTensor(tensor.shape, tensor.dtype, digest.hexdigest())
    return file.describe()


def _write_index(directory: Path, shards: list[_Shard]) -> WrittenFile:
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with open_new(directory / "model.safetensors.index.json") as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())
    return file.describe()


def _find_carried(base_directory: Path) -> list[Path]:
    """The base's other files that go with its weights.

    Raises:
      UserError: one is a link to somewhere else, which may be none of the model's; or there is no config.json.
    """
    root = base_directory.resolve()
    homes = (
        [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    )  # the hub's cache has links
    paths = [path for name in CARRIED_FILES if (path := base_directory / name).is_file()]
    for path in paths:
        if not any(path.resolve().is_relative_to(home) for home in homes):
            raise UserError(f"{path} is a link that leaves its directory: put the file itself there")
    if not paths or paths[0].name != "config.json":
        raise UserError(f"{base_directory / 'config.json'} is missing: nobody could load what is merged without it")
    return paths
