"""Base weights: where they come from, and the way from safetensors files to their stacked, sharded places."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from adaptax.config import UserError
from adaptax.mesh import partition
from adaptax.models import Architecture

PIECE_BYTES = 64 << 20  # the most that is read at once, so that host memory stays near the weights' own size
DTYPES = ("F32", "BF16", "F16")


def describe_weights(
    directory: Path | None, arch: Architecture, family: ModuleType, mesh: Mesh, dtype: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """What :func:`load_weights` will make, from the files' headers alone: path -> shape, type and sharding.

    Arrays are kept in the compute type, or in the checkpoint's own bfloat16 where that is narrower.

    Args:
      directory: safetensors files; None for random weights.
      arch: the model's numbers.
      family: the family's checkpoint module, such as ``gemma3_weights``.
      mesh: where the arrays go.
      dtype: compute type.

    Raises:
      UserError: listing every tensor that is missing, unexpected or of another shape.
    """
    sizes, files, prefix = family.axis_sizes(arch), {}, ""
    if directory is not None:
        files = _list_tensors(directory)
        prefix = _check_tensors(directory, files, arch, family)
    described = {}
    for path, axes in family.parameter_axes(arch).items():
        names = family.tensor_names(path, arch, prefix)
        is_bfloat16 = directory is not None and files[names[0][0]].dtype == "BF16"
        shape = tuple(sizes[axis] for axis in axes)
        kept = ml_dtypes.bfloat16 if is_bfloat16 else dtype
        described[path] = jax.ShapeDtypeStruct(shape, kept, sharding=partition(axes, shape, mesh))
    return described


def load_weights(
    directory: Path | None,
    arch: Architecture,
    family: ModuleType,
    described: Mapping[str, jax.ShapeDtypeStruct],
    seed: int,
) -> dict[str, jax.Array]:
    """The frozen base, as :func:`describe_weights` described it. Host memory stays near the size of the weights.

    The last base stays in memory and is handed out again to the next job of a sweep that asks for the same.
    """
    stamp = [(f.path, f.path.stat().st_mtime_ns) for f in _list_tensors(directory).values()] if directory else seed
    key = str((directory, arch, stamp, described))
    if key not in _last_base:
        _last_base.clear()
        _last_base[key] = _read_weights(directory, arch, family, described) if directory else _draw(described, seed)
    return _last_base[key]


_last_base: dict[str, dict[str, jax.Array]] = {}


def _read_weights(
    directory: Path, arch: Architecture, family: ModuleType, described: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    files = _list_tensors(directory)
    prefix, axes = family.text_prefix(files.keys()), family.parameter_axes(arch)
    loaded = {}
    for path, leaf in sorted(described.items(), key=lambda item: -item[1].size):
        names = family.tensor_names(path, arch, prefix)
        fill = functools.partial(_read_shard, files=files, names=names, axes=axes[path], leaf=leaf)
        loaded[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, fill)
    return loaded


def _draw(described: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """Random weights: normal with deviation 0.02, norms at zero, made in place on the mesh."""

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        keys = dict(zip(sorted(described), jax.random.split(key, len(described)), strict=True))
        return {
            path: jnp.zeros(leaf.shape, leaf.dtype)
            if path.endswith("scale")
            else 0.02 * jax.random.normal(keys[path], leaf.shape, leaf.dtype)
            for path, leaf in described.items()
        }

    shardings = {path: leaf.sharding for path, leaf in described.items()}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, from its file's header."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it


def _list_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Tensor name -> where it lies, from one or many safetensors files."""
    paths = _list_files(directory)
    if not paths:
        raise UserError(f"{directory} holds no *.safetensors file")
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in tensors:
                        raise UserError(f"{name:.200} is in {tensors[name].path} and in {path}: take one of them away")
                    view = file.get_slice(name)
                    tensors[name] = StoredTensor(path, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
    return tensors


def _list_files(directory: Path) -> list[Path]:
    """The safetensors files: those that the index names, or else all."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return sorted(directory.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        raise UserError(f"{index} is not a valid index: it has no weight_map") from None
    for name in names:
        if isinstance(name, str) and Path(name).name != name:
            raise UserError(f"{index}: {name!r:.80}: file names must not leave the directory")
        if not isinstance(name, str) or not name.endswith(".safetensors") or not name.isprintable():
            raise UserError(f"{index} is not a valid index: {name!r:.80} is not the name of a safetensors file")
    return [directory / name for name in sorted(names)]


def _check_tensors(directory: Path, files: Mapping[str, StoredTensor], arch: Architecture, family: ModuleType) -> str:
    """Accounts for every tensor; returns the prefix of the text model's names."""
    prefix = family.text_prefix(files.keys())
    if prefix is None:
        raise UserError(f"{directory} holds no embed_tokens.weight under {', '.join(family.TEXT_PREFIXES)}")
    expected = family.tensor_shapes(arch, prefix)
    tied = {name for name in files if name.endswith("lm_head.weight")}  # a second copy of the embedding, if written
    unexpected = [n for n in files if n not in expected and n not in tied and not family.is_left_out(n)]
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in files]
    problems += [f"unexpected {name:.200} {list(files[name].shape)}" for name in sorted(unexpected)]
    for name, shape in (expected | {name: files[name].shape for name in tied}).items():
        if name in files and files[name].shape != shape:
            problems.append(f"{name} is {list(files[name].shape)}, not {list(shape)}")
        elif name in files and files[name].dtype not in DTYPES:
            problems.append(f"{name} is of type {files[name].dtype}, not F32, BF16 or F16")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{directory} does not hold this model, {len(problems)} of its tensors are wrong: {shown}")
    for name in tied:
        _check_tied_head(files, name, f"{prefix}embed_tokens.weight")
    return prefix


def _check_tied_head(files: Mapping[str, StoredTensor], head: str, embedding: str) -> None:
    """Refuses a head that is not the embedding: it would be ignored, and another model trained."""
    (rows, *row) = files[embedding].shape
    pairs = (_read_rows(files[name].path, name, range(rows), tuple(row)) for name in (head, embedding))
    if files[head].shape != files[embedding].shape or any(
        not np.array_equal(a, b) for (_, a), (_, b) in zip(*pairs, strict=True)
    ):
        raise UserError(f"{files[head].path}: {head} differs from the embedding, and Gemma 3's head is tied to it")


def _read_shard(
    index: tuple[slice, ...] | None,
    *,
    files: Mapping[str, StoredTensor],
    names: list[list[str]],
    axes: str,
    leaf: jax.ShapeDtypeStruct,
) -> np.ndarray:
    """One device's part of a stacked array, read piece by piece into a buffer that jax takes over without a copy."""
    assert index is not None
    bounds = [range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)]
    out = _aligned_empty(tuple(len(b) for b in bounds), leaf.dtype)
    if not axes.startswith("L"):  # one tensor, as stored
        for rows, piece in _read_rows(files[names[0][0]].path, names[0][0], bounds[0], leaf.shape[1:]):
            out[rows.start - bounds[0].start : rows.stop - bounds[0].start] = piece[(slice(None), *index[1:])]
        return out
    for place, layer in enumerate(bounds[0]):
        parts = [_read_whole(files[name].path, name) for name in names[layer]]
        whole = parts[0] if len(axes) == 2 else join_linear(parts, axes[1:], leaf.shape[1:])
        out[place] = whole[index[1:]]
    return out


def join_linear(parts: list[np.ndarray], axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """[out, in] tensors as one [in..., out...] weight; several are joined on axis C."""
    if "C" not in axes:
        return parts[0].T.reshape(shape)
    place = axes.index("C")
    single = shape[:place] + shape[place + 1 :]
    return np.stack([part.T.reshape(single) for part in parts], axis=place)


def split_linear(weight: np.ndarray, axes: str, num_in: int) -> list[np.ndarray]:
    """The inverse of :func:`join_linear`: a weight whose first ``num_in`` axes are inputs as [out, in] tensors."""
    parts = [weight] if "C" not in axes else list(np.moveaxis(weight, axes.index("C"), 0))
    width = int(np.prod(weight.shape[:num_in]))
    return [np.ascontiguousarray(part.reshape(width, -1).T) for part in parts]


def _read_whole(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:  # opened anew each time: mapped pages are given back at once
        return file.get_tensor(name)


def _read_rows(path: Path, name: str, rows: range, row: tuple[int, ...]) -> Iterator[tuple[range, np.ndarray]]:
    step = max(1, PIECE_BYTES // (int(np.prod(row)) * 4))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        with safe_open(path, "numpy") as file:
            yield range(start, stop), file.get_slice(name)[start:stop]


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A buffer on a 64-byte border, which the CPU backend uses as it is instead of copying it."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
