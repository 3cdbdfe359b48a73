"""Base weights: where they come from, and the way from safetensors or Orbax to their stacked, sharded places."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from adaptax.mesh import partition
from adaptax.models import Architecture
from adaptax.orbax_files import StoredArray, find_checkpoint, list_arrays
from adaptax.quantize import KINDS, find_kind, quantize, quantized_shapes
from adaptax.schema import UserError
from adaptax.tensor_files import DTYPES, PIECE_BYTES, StoredTensor, list_tensors

Stored = StoredTensor | StoredArray
READING_BYTES = 512 << 20  # that all threads may be at work on, so that host memory stays near the weights' own size
MAX_READERS = 8


def describe_weights(
    directory: Path | None,
    arch: Architecture,
    family: ModuleType,
    mesh: Mesh,
    dtype: Any,
    quantization: str | None = None,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What :func:`load_weights` will make, from the files' headers alone: path -> shape, type and sharding.

    Arrays are kept in the compute type, or in the checkpoint's own bfloat16 where that is narrower. Quantised matrices
    are two arrays, as :mod:`adaptax.quantize` tells.

    Args:
      directory: of safetensors files or an Orbax checkpoint; None for random weights.
      arch: the model's numbers.
      family: the family's checkpoint module, such as ``gemma3_weights``.
      mesh: where the arrays go.
      dtype: compute type.
      quantization: ``int8``, ``int4`` or ``nf4`` for the layers' matrices; None keeps them as they are.

    Raises:
      UserError: listing every tensor that is missing, unexpected or of another shape.
    """
    sizes, files, prefix = family.axis_sizes(arch), {}, ""
    if directory is not None:
        files = _list_stored(directory, family)
        prefix = check_tensors(directory, files, arch, family)
    described = {}
    for path, axes in family.parameter_axes(arch).items():
        names = family.tensor_names(path, arch, prefix)
        is_bfloat16 = directory is not None and files[names[0][0]].dtype == "BF16"
        shape = tuple(sizes[axis] for axis in axes)
        kept = {path: (shape, ml_dtypes.bfloat16 if is_bfloat16 else dtype)}
        if quantization is not None and (num_in := _num_in_axes(family, path)):
            values, scales = quantized_shapes(shape[1:], num_in, quantization)
            kept = {path: ((shape[0], *values), KINDS[quantization])}
            kept |= {f"{path}_{quantization}": ((shape[0], *scales), jnp.float32)}
        for name, (shape, kind) in kept.items():
            described[name] = jax.ShapeDtypeStruct(shape, kind, sharding=partition(axes, shape, mesh))
    return described


def _list_stored(directory: Path, family: ModuleType) -> dict[str, Stored]:
    folder = find_checkpoint(directory)
    return {**(list_tensors(directory) if folder is None else list_arrays(folder, family.spell_orbax))}


def _num_in_axes(family: ModuleType, path: str) -> int:
    """Of a projection's weight in a layer; 0 for all else."""
    kind = path.removeprefix("layers/").removesuffix("/w")
    return len(family.LINEARS[kind].in_axes) if kind in family.LINEARS else 0


def load_weights(
    directory: Path | None,
    arch: Architecture,
    family: ModuleType,
    described: Mapping[str, jax.ShapeDtypeStruct],
    seed: int,
) -> dict[str, jax.Array]:
    """The frozen base, as :func:`describe_weights` described it. Host memory stays near the size of the weights.

    Files are read by several threads. It may itself be called in a thread, while another one compiles: calls wait for
    each other. The last base stays in memory and is handed out again to the next job of a sweep that asks for the same.
    """
    files = {file.path for file in _list_stored(directory, family).values()} if directory else set()
    stamp = sorted((path, path.stat().st_mtime_ns) for path in files) if directory else seed
    key = str((directory, arch, stamp, described))
    with _loading:
        if key not in _last_base:
            _last_base.clear()
            read = functools.partial(_read_weights, directory) if directory else functools.partial(_draw, seed)
            _last_base[key] = read(arch, family, described)
        return _last_base[key]


def take_apart(base: dict[str, jax.Array], dtype: Any) -> dict[str, Any]:
    """The base with a tuple of arrays, one for each layer, in the place of every stack, which is given up for it.

    For generation, which reads every weight once for a token: some backends copy what they take out of a stack, and
    weights that are narrower than the compute type would be widened for every token.

    Args:
      base: as it was loaded; it is empty afterwards.
      dtype: the compute type.
    """
    forget_weights()  # it is not to be handed out again
    apart: dict[str, Any] = {}
    for path in list(base):
        stack = base.pop(path)
        is_wider = stack.dtype == jnp.bfloat16 and dtype == jnp.float32
        if path.startswith("layers/"):
            apart[path] = jax.block_until_ready(_split_layers(stack, dtype if is_wider else stack.dtype))
        else:
            apart[path] = jax.block_until_ready(stack.astype(dtype)) if is_wider else stack
        if apart[path] is not stack:
            stack.delete()
    return apart


def forget_weights() -> None:
    """Gives the last base back, once nobody else holds it."""
    with _loading:
        _last_base.clear()


@functools.partial(jax.jit, static_argnums=1)
def _split_layers(stack: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    return tuple(stack.astype(dtype))


_last_base: dict[str, dict[str, jax.Array]] = {}
_loading = threading.Lock()


def _draw(
    seed: int, arch: Architecture, family: ModuleType, described: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Random weights: normal with deviation 0.02, norms at zero, made in place on the mesh."""
    sizes, all_axes = family.axis_sizes(arch), family.parameter_axes(arch)

    def draw_quantized(key: jax.Array, path: str, kind: str) -> dict[str, jax.Array]:
        """Layer by layer, so that one alone is there in float32."""
        L, *shape = (sizes[axis] for axis in all_axes[path])

        def draw_layer(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = 0.02 * jax.random.normal(key, shape, jnp.float32)
            array = quantize(weight, _num_in_axes(family, path), kind)
            return array.values, array.scales

        stacked = jax.lax.map(draw_layer, jax.random.split(key, L))
        return dict(zip((path, f"{path}_{kind}"), stacked, strict=True))

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        drawn, keys = {}, dict(zip(sorted(all_axes), jax.random.split(key, len(all_axes)), strict=True))
        for path in all_axes:
            leaf, kind = described[path], find_kind(described, path)
            if kind is not None:
                drawn |= draw_quantized(keys[path], path, kind)
            elif path.endswith("scale"):
                drawn[path] = jnp.zeros(leaf.shape, leaf.dtype)
            else:
                drawn[path] = 0.02 * jax.random.normal(keys[path], leaf.shape, leaf.dtype)
        return drawn

    shardings = {path: leaf.sharding for path, leaf in described.items()}
    return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))


def check_tensors(directory: Path, files: Mapping[str, Stored], arch: Architecture, family: ModuleType) -> str:
    """Accounts for every tensor, from the files' headers; returns the prefix of the text model's names.

    Raises:
      UserError: listing every tensor that is missing, unexpected or of another shape.
    """
    prefix = family.text_prefix(files.keys())
    if prefix is None:
        raise UserError(f"{directory} holds no embed_tokens.weight under {', '.join(family.TEXT_PREFIXES)}")
    expected = family.tensor_shapes(arch, prefix)
    tied = {name for name in files if family.is_tied_head(name)}  # a second copy of the embedding, if written
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


def _check_tied_head(files: Mapping[str, Stored], head: str, embedding: str) -> None:
    """Refuses a head that is not the embedding: it would be ignored, and another model trained."""
    a, b = files[head], files[embedding]
    if a.shape != b.shape or any(not np.array_equal(a.map(rows), b.map(rows)) for rows in a.split()):
        raise UserError(f"{files[head].path}: {head} differs from the embedding, and Gemma 3's head is tied to it")


def _read_weights(
    directory: Path, arch: Architecture, family: ModuleType, described: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Every tensor is read once, whatever the mesh. One array after the other, by as many threads as there is room."""
    files, sizes = _list_stored(directory, family), family.axis_sizes(arch)
    prefix = family.text_prefix(files.keys())
    all_axes, sharing = family.parameter_axes(arch), {}
    for path in all_axes:  # gate and up may be one tensor
        sharing.setdefault(str(family.tensor_names(path, arch, prefix)), []).append(path)
    loaded: dict[str, jax.Array] = {}
    for paths in sorted(sharing.values(), key=lambda paths: -described[paths[0]].size):
        stored = [[files[name] for name in names] for names in family.tensor_names(paths[0], arch, prefix)]
        kinds = {path: find_kind(described, path) for path in paths}
        arrays = {n: _Parts(described[n]) for p, kind in kinds.items() for n in ([p, f"{p}_{kind}"] if kind else [p])}
        if all_axes[paths[0]].startswith("L"):
            targets = []
            for path, kind in kinds.items():
                axes, num_in = all_axes[path][1:], _num_in_axes(family, path)
                shape, parts = tuple(sizes[axis] for axis in axes), [arrays[path]]
                parts += [arrays[f"{path}_{kind}"]] if kind else []
                targets.append(_Target(axes, shape, family.stored_axes(path, prefix), num_in, kind, parts))
            read = functools.partial(_read_layer, targets)
            pieces, piece_bytes = list(enumerate(stored)), sum(target.working_bytes for target in targets)
        else:
            read = functools.partial(_read_rows, array=arrays[paths[0]])
            pieces, piece_bytes = [(rows, stored[0][0]) for rows in stored[0][0].split()], PIECE_BYTES
        num_readers = max(1, min(MAX_READERS, os.cpu_count() or 1, READING_BYTES // piece_bytes, len(pieces)))
        with ThreadPoolExecutor(num_readers, thread_name_prefix="weights") as readers:
            list(readers.map(read, *zip(*pieces, strict=True)))
        loaded |= {name: parts.finish() for name, parts in arrays.items()}
    return loaded


def _read_rows(rows: range, tensor: Stored, array: _Parts) -> None:
    """Rows of a tensor that is used as it is stored."""
    array.write(rows, tensor.map(rows))


@dataclass(frozen=True)
class _Target:
    """A stacked array that layers are read for, and how it comes from their tensors."""

    axes: str  # of a layer
    shape: tuple[int, ...]
    stored_axes: str | None
    num_in: int
    kind: str | None  # how it is quantised
    arrays: list[_Parts]  # it, or its values and scales

    @property
    def working_bytes(self) -> int:
        """Of host memory while a layer is read, at most; a compressed one is there twice more."""
        return ((16 if self.kind else 4) + (8 if self.stored_axes else 0)) * math.prod(self.shape)

    def write(self, layer: int, parts: list[np.ndarray]) -> None:
        """A layer of it."""
        if self.stored_axes is not None:
            pieces = [arrange(parts[0], self.stored_axes, self.axes)]
        else:
            pieces = [join_linear(parts, self.axes, self.shape) if self.num_in else parts[0]]
        if self.kind is not None:
            quantized = _quantize_on_host(pieces[0], self.num_in, self.kind)
            pieces = [np.asarray(quantized.values), np.asarray(quantized.scales)]
        for array, piece in zip(self.arrays, pieces, strict=True):
            array.write(range(layer, layer + 1), piece[None])


def _read_layer(targets: list[_Target], layer: int, tensors: list[Stored]) -> None:
    """A layer's part of the stacked arrays that come from these tensors."""
    parts = [tensor.map() for tensor in tensors]
    for target in targets:
        target.write(layer, parts)


def _quantize_on_host(weight: np.ndarray, num_in: int, kind: str) -> Any:
    """By the CPU, where it has its own backend: the same bits whatever trains on them, and no copy to a device."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        device = jax.local_devices()[0]
    return _jitted_quantize(jax.device_put(weight, device), num_in, kind)


_jitted_quantize = jax.jit(quantize, static_argnums=(1, 2))


class _Parts:
    """The parts of an array that this process's devices hold, in host memory until all of it is read."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf = leaf
        assert leaf.sharding is not None
        indices = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        self._buffers = {self._bounds(index): self._make_buffer(self._bounds(index)) for index in indices}

    def _bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        assert index is not None
        return tuple(s.indices(n)[:2] for s, n in zip(index, self.leaf.shape, strict=True))

    def _make_buffer(self, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return _aligned_empty(tuple(stop - start for start, stop in bounds), self.leaf.dtype)

    def write(self, rows: range, piece: np.ndarray) -> None:
        """Puts a piece, all of some rows, into every part that has of them. Threads may write different rows."""
        bits = f"u{self.leaf.dtype.itemsize}"  # numpy copies its own types without holding other threads back
        piece = piece.astype(self.leaf.dtype, copy=False).view(bits)
        for ((first, last), *others), buffer in self._buffers.items():
            start, stop = max(rows.start, first), min(rows.stop, last)
            if start < stop:
                taken = piece[(slice(start - rows.start, stop - rows.start), *(slice(*bounds) for bounds in others))]
                buffer.view(bits)[start - first : stop - first] = taken

    def finish(self) -> jax.Array:
        """The array on the mesh; the CPU backend takes the buffers over without a copy."""
        fill: Callable[..., np.ndarray] = lambda index: self._buffers[self._bounds(index)]  # noqa: E731
        return jax.make_array_from_callback(self.leaf.shape, self.leaf.sharding, fill)


def arrange(stored: np.ndarray, stored_axes: str, axes: str) -> np.ndarray:
    """An array of an Orbax checkpoint with its axes in another order; a leading digit is a place on the first one."""
    if stored_axes[0].isdigit():
        stored, stored_axes = stored[int(stored_axes[0])], stored_axes[1:]
    if stored_axes == axes or len(axes) == 2:
        return stored if stored_axes == axes else _transpose(stored)
    return np.ascontiguousarray(stored.transpose([stored_axes.index(axis) for axis in axes]))


def join_linear(parts: list[np.ndarray], axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """[out, in] tensors as one [in..., out...] weight; several are joined on axis C."""
    if "C" not in axes:
        return _transpose(parts[0]).reshape(shape)
    place = axes.index("C")
    single = shape[:place] + shape[place + 1 :]
    return np.stack([_transpose(part).reshape(single) for part in parts], axis=place)


def _transpose(matrix: np.ndarray) -> np.ndarray:
    """Transposed and contiguous, in strips that stay in the processor's cache."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    bits = f"u{matrix.dtype.itemsize}"
    source, target = matrix.view(bits), turned.view(bits)
    for start in range(0, len(matrix), 128):
        target[:, start : start + 128] = source[start : start + 128].T
    return turned


def split_linear(weight: np.ndarray, axes: str, num_in: int) -> list[np.ndarray]:
    """The inverse of :func:`join_linear`: a weight whose first ``num_in`` axes are inputs as [out, in] tensors."""
    parts = [weight] if "C" not in axes else list(np.moveaxis(weight, axes.index("C"), 0))
    width = int(np.prod(weight.shape[:num_in]))
    return [np.ascontiguousarray(part.reshape(width, -1).T) for part in parts]


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A buffer on a 64-byte border, which the CPU backend uses as it is instead of copying it."""
    num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)
