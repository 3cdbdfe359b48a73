"""Whole models in Google's own layout, as Orbax checkpoints that the gemma library and Tunix load."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from adaptax.checkpoint import explain
from adaptax.config import UserError
from adaptax.models import Architecture, Family
from adaptax.orbax_files import UNFINISHED, list_arrays

DATA_FILE_BYTES = 128 << 20  # a file is held in memory until it is full
CONCURRENT_GB = 1  # that is being written at a time, as each part of it is copied on the way


def save_orbax_checkpoint(directory: Path, base: Mapping[str, Any], family: Family, arch: Architecture) -> None:
    """Writes the base of a text model, whole or not at all, and reads it again.

    Of several processes one alone calls it, with arrays on the host. The embedding is cut to Google's number of rows:
    those that Hugging Face has added to larger models stand for images.

    Args:
      directory: what is made; the tokenizer is not written.
      base: path -> stacked array in a floating type, as :mod:`adaptax.weights` loads it, not quantised.
      family: the model family.
      arch: the model's numbers.

    Raises:
      UserError: the directory exists, it cannot be written, or what was read is not what was to be written.
    """
    if directory.exists():
        raise UserError(f"{directory} exists: choose another name, or take it away")
    partial = directory.absolute().with_name(directory.name + ".partial")
    for stale in (partial, partial.with_name(partial.name + UNFINISHED)):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    tree = orbax_tree(base, family, arch)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix="orbax_export",
        )
        as_they_are = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # nobody changes them meanwhile
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, as_they_are))
        handler = ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=CONCURRENT_GB, type_handler_registry=registry, multiprocessing_options=alone
        )
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(partial, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=DATA_FILE_BYTES))
        _check_written(partial, tree)
        partial.rename(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory} was not written: {explain(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def orbax_tree(base: Mapping[str, Any], family: Family, arch: Architecture) -> dict[str, dict[str, np.ndarray]]:
    """Module -> parameter -> array on the host, flat as Google publishes it: reading backwards, by the same table."""
    checkpoint, prefix = family.checkpoint, family.checkpoint.ORBAX_PREFIX
    parts: dict[str, dict[str, np.ndarray]] = {}  # name -> place on a shared axis, "" where there is none -> array
    for path, axes in checkpoint.parameter_axes(arch).items():
        stacked, stored_axes = np.asarray(base[path]), checkpoint.stored_axes(path, prefix)
        is_layered = axes.startswith("L")
        arrays = stacked if is_layered else [stacked[: checkpoint.ORBAX_VOCAB_SIZE]]
        place, order = "".join(filter(str.isdigit, stored_axes)), [axis for axis in stored_axes if axis.isalpha()]
        turn = [axes.removeprefix("L").index(axis) for axis in order]
        for array, (name,) in zip(arrays, checkpoint.tensor_names(path, arch, prefix), strict=True):
            parts.setdefault(name, {})[place] = array.transpose(turn)
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, places in parts.items():
        module, _, parameter = name.rpartition("/")
        array = places[""] if "" in places else _stack([places.pop(place) for place in sorted(places)])
        tree.setdefault(module, {})[parameter] = array
    return tree


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    """One array of several, in a file without a name, so that it takes no memory of its own."""
    shape, dtype = (len(arrays), *arrays[0].shape), arrays[0].dtype
    with tempfile.TemporaryFile() as file:
        stacked = np.memmap(file, dtype, "w+", shape=shape)
    for place, array in enumerate(arrays):
        stacked[place] = array
    return stacked.view(np.ndarray)


def _check_written(folder: Path, tree: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    wanted = {f"{module}/{name}": array for module, arrays in tree.items() for name, array in arrays.items()}
    found = list_arrays(folder, str)
    same = found.keys() == wanted.keys() and all(_is_same(found[name].map(), wanted[name]) for name in wanted)
    if not same:
        raise UserError(f"{folder}: what was read back is not what was written; is the disk full or failing?")


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{b.dtype.itemsize}"
    return a.dtype == b.dtype and np.array_equal(a.view(bits), np.ascontiguousarray(b).view(bits))
