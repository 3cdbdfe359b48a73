"""What is written in Google's layout: Orbax restores it, we load it, and it is there whole or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orbax_layout
import support
from adaptax.config import UserError
from adaptax.models.gemma3_weights import SIZES
from adaptax.orbax_export import save_orbax_checkpoint

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_orbax_restores_the_tree_that_google_publishes(mesh: tuple[int, int], tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text", support.make_mesh(*mesh))
    save_orbax_checkpoint(tmp_path / "out", base, support.FAMILY, arch)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out")
    expected = orbax_layout.convert(GOLDEN / "text")
    assert restored.keys() == expected.keys()
    for module, arrays in expected.items():
        assert restored[module].keys() == arrays.keys()
        for name, array in arrays.items():
            assert restored[module][name].dtype == array.dtype
            np.testing.assert_array_equal(restored[module][name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_written_is_loaded_bit_for_bit(dtype: type, tmp_path: Path) -> None:
    """Arrays on the host, as a caller has them who has merged adapters into them."""
    tiny = SIZES["tiny"]
    drawn = support.load(None, tiny, support.make_mesh())
    base = {path: np.asarray(array).astype(dtype) for path, array in drawn.items()}
    base["final_norm/scale"] = np.full(tiny.embed_dim, -0.0, dtype)
    save_orbax_checkpoint(tmp_path / "out", base, support.FAMILY, tiny)
    arch, loaded = support.open_checkpoint(tmp_path / "out")
    assert arch == tiny
    bits = f"u{np.dtype(dtype).itemsize}"
    for path, array in base.items():
        assert loaded[path].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(loaded[path]).view(bits), array.view(bits))


def test_rows_for_images_are_not_written(tmp_path: Path) -> None:
    arch = replace(SIZES["4b"], num_layers=1, embed_dim=4, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=2)
    base = support.load(None, arch, support.make_mesh())
    save_orbax_checkpoint(tmp_path / "out", base, support.FAMILY, arch)
    with ocp.StandardCheckpointer() as checkpointer:
        written = checkpointer.restore(tmp_path / "out")["transformer/embedder"]["input_embedding"]
    np.testing.assert_array_equal(written, np.asarray(base["embedder/embedding"])[:262_144])


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists: choose another name"):
        save_orbax_checkpoint(tmp_path / "out", base, support.FAMILY, arch)
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out was not written: "):
        save_orbax_checkpoint(tmp_path / "file" / "out", base, support.FAMILY, arch)


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text")
    for stale in ("out.partial", "out.partial.orbax-checkpoint-tmp"):
        (tmp_path / stale / "d").mkdir(parents=True)
    save_orbax_checkpoint(tmp_path / "out", base, support.FAMILY, arch)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
