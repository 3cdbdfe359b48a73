"""States that are saved and read again: every bit of them, on any mesh, or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

import support
from adaptax.checkpoint import as_tree, digest_arrays, read_digests, restore
from adaptax.manifest import Damaged, Manifest, list_checkpoints, read_checkpoint, seal, step_of
from adaptax.optim import OPTIMIZERS
from adaptax.progress import Progress
from adaptax.run_folder import RunFolder
from adaptax.step import TrainState
from small_runs import arrays_of, make_saver, make_state, save_steps

# Where Orbax fails, coroutines are left behind; what they say when they are collected concerns no later test.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"),
    pytest.mark.usefixtures("collected"),
]
MESHES = [(2, 4), (8, 1), (1, 4)]


def assert_bits(found: TrainState, wanted: dict[str, np.ndarray]) -> None:
    """A state holds exactly these bits."""
    arrays = arrays_of(found)
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape), name
        assert array.tobytes() == wanted[name].tobytes(), name


def steps_in(folder: RunFolder) -> list[int | None]:
    """The steps of all checkpoints."""
    return [step_of(path) for path in list_checkpoints(folder.checkpoints)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture(scope="module")
def small() -> TrainState:
    """A state that no test changes."""
    return make_state(support.make_mesh())


# Every bit comes back


@pytest.mark.parametrize(("optimizer", "num_updates"), [("adamw", 0), *((name, 3) for name in sorted(OPTIMIZERS))])
def test_what_is_restored_is_what_was_saved(folder: RunFolder, optimizer: str, num_updates: int) -> None:
    state, other = (
        make_state(support.make_mesh(), optimizer, seed, num_updates=n) for seed, n in ((0, num_updates), (1, 1))
    )
    before = arrays_of(state)
    path = save_steps(folder, state, num_updates)[0]
    restored = restore(path, read_checkpoint(path), other)
    assert_bits(restored, before)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.map(lambda array: array.sharding, restored) == jax.tree.map(lambda array: array.sharding, other)
    assert int(restored.step) == num_updates


@pytest.mark.parametrize("value", [-0.0, np.inf, 1e-45])
def test_every_kind_of_number_comes_back(folder: RunFolder, small: TrainState, value: float) -> None:
    """A NaN with its payload too."""
    adapters = {name: jnp.full_like(array, value) for name, array in small.adapters.items()}
    payload = np.full(small.adapters["layers/mlp/down_proj/w_lora_b"].shape, 0x7FC12345, np.uint32).view(np.float32)
    state = replace(small, adapters=adapters | {"layers/mlp/down_proj/w_lora_b": jnp.asarray(payload)})
    path = save_steps(folder, state, 1)[0]
    assert_bits(restore(path, read_checkpoint(path), small), arrays_of(state))


@pytest.mark.parametrize(("fsdp", "tp", "optimizer"), [(2, 4, "adafactor"), *((*mesh, "adamw") for mesh in MESHES)])
def test_a_state_moves_between_meshes_without_a_changed_bit(
    folder: RunFolder, fsdp: int, tp: int, optimizer: str
) -> None:
    alone, there = (make_state(mesh, optimizer, 1) for mesh in (support.make_mesh(), support.make_mesh(fsdp, tp)))
    wanted = arrays_of(alone)
    first = save_steps(folder, alone, 1)[0]
    moved = restore(first, read_checkpoint(first), there)
    assert_bits(moved, wanted)
    assert jax.tree.map(lambda array: array.sharding, moved) == jax.tree.map(lambda array: array.sharding, there)
    assert any(not array.sharding.is_fully_replicated for array in moved.adapters.values())
    second = save_steps(folder, moved, 2)[0]
    assert read_checkpoint(second).digests == read_checkpoint(first).digests
    assert_bits(restore(second, read_checkpoint(second), alone), wanted)


def test_states_move_between_meshes_of_several_devices(folder: RunFolder) -> None:
    here, there = (make_state(support.make_mesh(*shape), seed=i) for i, shape in enumerate(((2, 4), (8, 1))))
    path = save_steps(folder, here, 1)[0]
    assert_bits(restore(path, read_checkpoint(path), there), arrays_of(here))


# What is not what was saved


def digests_of(tree: Any) -> dict[str, str]:
    """By array."""
    return read_digests(digest_arrays(tree))


@pytest.mark.parametrize(("num_changes", "count"), [(100, 1), (30, 2), (30, 5)])
def test_the_digest_of_an_array_tells_every_change(small: TrainState, num_changes: int, count: int) -> None:
    rng = np.random.default_rng(count)
    leaves, tree = jax.tree.flatten(as_tree(small))
    before = digests_of(as_tree(small))
    for _ in range(num_changes):
        i = rng.choice([i for i, leaf in enumerate(leaves) if leaf.size >= count])
        words = np.array(leaves[i]).view(np.uint32)
        for place in rng.choice(words.size, count, replace=False):
            words.reshape(-1)[place] ^= np.uint32(1) << np.uint32(rng.integers(32))
        changed = [*leaves[:i], jax.device_put(words.view(leaves[i].dtype), leaves[i].sharding), *leaves[i + 1 :]]
        after = digests_of(tree.unflatten(changed))
        assert len([name for name in before if before[name] != after[name]]) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: -x,
        lambda x: np.concatenate([-x[:, :2], x[:, 2:]], axis=1),
        lambda x: x[::-1].copy(),
        lambda x: x[:, [1, 0, *range(2, x.shape[1])]],
        lambda x: x[:, :, [1, 0, *range(2, x.shape[2])]],
        lambda x: np.roll(x, 1, axis=1),
        lambda x: x.swapaxes(1, 2).reshape(x.shape),
        lambda x: np.zeros_like(x),
    ],
    ids=["negated", "two_negated", "layers", "rows", "columns", "rolled", "transposed", "zeros"],
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "constant"])
def test_the_digest_of_an_array_depends_on_where_everything_stands(change: Callable[[Any], Any], kind: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 16, 4), np.float32)
    if kind == "constant":  # few different bits, and none at the low end: such are the first moments of a run
        x = np.where(x > 0, np.float32(2.0), np.float32(-2.0))
    elif kind == "bfloat16":
        x = np.array(jnp.asarray(x, jnp.bfloat16))
    assert digests_of({"x": jnp.asarray(x)}) != digests_of({"x": jnp.asarray(change(x))})
    assert digests_of({"x": jnp.asarray(x)}) == digests_of({"x": jnp.asarray(x.copy())})


def write_changed(path: Path, tree: Any, manifest: Manifest) -> Path:
    """A checkpoint all of whose files are sealed, with these arrays and a manifest of others."""
    shutil.rmtree(path, ignore_errors=True)
    ocp.save_checkpointables(str(path / "arrays"), {"state": tree})
    seal(path, manifest)
    assert read_checkpoint(path) == manifest  # the files are as they were written
    return path


def test_a_changed_bit_of_an_array_is_told_where_all_files_are_right(folder: RunFolder, small: TrainState) -> None:
    path = save_steps(folder, small, 1)[0]
    manifest, rng = read_checkpoint(path), np.random.default_rng(0)
    names = [jax.tree_util.keystr(name) for name, _ in jax.tree_util.tree_leaves_with_path(as_tree(small))]
    leaves, tree = jax.tree.flatten(as_tree(small))
    for i in rng.choice(len(leaves), 8, replace=False):
        words = np.array(leaves[i]).view(np.uint32)
        words.reshape(-1)[rng.integers(words.size)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        changed = [*leaves[:i], jax.device_put(words.view(leaves[i].dtype), leaves[i].sharding), *leaves[i + 1 :]]
        write_changed(path, tree.unflatten(changed), manifest)
        with pytest.raises(Damaged) as caught:
            restore(path, manifest, small)
        assert str(caught.value) == f"the array {names[i]} is not what was saved"


@pytest.mark.parametrize("what", ["missing", "extra", "dtype", "shape", "wider"])
def test_arrays_that_do_not_fit_are_told(folder: RunFolder, small: TrainState, what: str) -> None:
    path = save_steps(folder, small, 1)[0]
    manifest, tree, name = read_checkpoint(path), as_tree(small), "layers/mlp/down_proj/w_lora_a"
    tree["adapters"] = dict(tree["adapters"])
    array = tree["adapters"].pop(name) if what == "missing" else tree["adapters"][name]
    if what == "extra":
        tree["adapters"]["layers/mlp/up_proj/w_lora_a"] = array
    elif what == "dtype":
        tree["adapters"][name] = array.astype(jnp.bfloat16)
    elif what in ("shape", "wider"):
        tree["adapters"][name] = array[:, :-1] if what == "shape" else jnp.concatenate([array, array], axis=1)
    write_changed(path, tree, manifest)
    with pytest.raises(Damaged, match=r"arrays cannot be read|is not what was saved") as caught:
        restore(path, manifest, small)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_other_arrays_is_told(folder: RunFolder, small: TrainState) -> None:
    path = save_steps(folder, small, 1)[0]
    manifest = read_checkpoint(path)
    with pytest.raises(Damaged, match="holds other arrays than this version of adaptax, such as extra"):
        restore(path, replace(manifest, digests=manifest.digests | {"extra": "00000000"}), small)


def test_arrays_that_are_gone_are_told(folder: RunFolder, small: TrainState) -> None:
    path = save_steps(folder, small, 1)[0]
    manifest = read_checkpoint(path)
    shutil.rmtree(path / "arrays" / "state")
    with pytest.raises(Damaged, match="its arrays cannot be read: "):
        restore(path, manifest, small)


# What is kept


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [(1, None, [5]), (2, None, [4, 5]), (3, 1, [1, 3, 4, 5]), (1, 2, [2, 5]), (1, 5, [5]), (9, None, [1, 2, 3, 4, 5])],
)
def test_the_latest_and_the_best_are_kept_and_no_others(
    folder: RunFolder, small: TrainState, keep: int, best: int | None, kept: list[int]
) -> None:
    saver = make_saver(folder, small, keep)
    for step in range(1, 6):
        saver.save(step, small, Progress(best_step=best if best and best <= step else None))
    saver.close()
    assert steps_in(folder) == kept
    assert {path.name for path in folder.checkpoints.iterdir()} == {f"step_{step:08d}" for step in kept}
    assert all(read_checkpoint(path).step == step_of(path) for path in list_checkpoints(folder.checkpoints))


def test_a_best_one_that_was_displaced_goes(folder: RunFolder, small: TrainState) -> None:
    saver = make_saver(folder, small, keep=1)
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)):
        saver.save(step, small, Progress(best_step=best))
    saver.close()
    assert steps_in(folder) == [4, 5]
    assert (folder.adapters / "best").is_dir()


def test_adapters_of_the_best_and_the_last_are_written(folder: RunFolder, small: TrainState) -> None:
    saver = make_saver(folder, small)
    for step, best in ((1, 1), (2, 1)):
        state = replace(small, adapters={name: array * step for name, array in small.adapters.items()})
        saver.save(step, state, Progress(best_step=best))
    saver.close()
    name = "layers/attn/q_einsum/w_lora_a"
    for which, step in (("best", 1), ("last", 2)):
        found = np.load(folder.adapters / which / "adapters.npz")[name.replace("/", ".")]
        np.testing.assert_array_equal(found, small.adapters[name] * step)


def test_a_future_that_was_taken_back_goes_when_a_new_checkpoint_is_whole(folder: RunFolder, small: TrainState) -> None:
    """Those up to the one that was resumed from stay, as many as are kept; the others are of no run any more."""
    save_steps(folder, small, 1, 2, 4, 6, 8, keep=9)
    resumed = replace(small, step=jnp.int32(2))
    saver = make_saver(folder, resumed, keep=3)
    assert steps_in(folder) == [1, 2, 4, 6, 8]
    blocker = folder.checkpoints / "step_00000005.partial"
    blocker.write_text("in the way")
    saver.save(5, resumed, Progress())
    saver.wait()
    assert saver.failure
    assert steps_in(folder) == [1, 2, 4, 6, 8]
    blocker.unlink(missing_ok=True)
    saver.save(7, resumed, Progress())
    saver.close()
    assert steps_in(folder) == [1, 2, 7]


def test_what_a_manifest_says_is_what_was_so_when_it_was_saved(folder: RunFolder, small: TrainState) -> None:
    """The thread that writes it may be late."""
    saver, progress = make_saver(folder, small), Progress(losses=[1.0], train_loss=1.0)
    saver.save(1, small, progress)
    progress.add_loss(2.0)
    progress.losses.append(3.0)
    progress.add_evaluation(2, 0.5, 0.0)
    saver.close()
    saved = read_checkpoint(folder.checkpoints / "step_00000001").progress
    assert Progress(**saved) == Progress(losses=[1.0], train_loss=1.0)


# Saves that fail


def test_a_save_that_fails_is_told_and_leaves_the_others_whole(folder: RunFolder, small: TrainState, caplog) -> None:
    saver = make_saver(folder, small)
    saver.save(1, small, Progress())
    blocker = folder.checkpoints / "step_00000002.partial"
    saver.wait()
    blocker.write_text("in the way")
    saver.save(2, small, Progress())
    saver.wait()
    assert saver.failure is not None
    assert "step_00000002 was not written: " in saver.failure
    assert "\n" not in saver.failure
    assert [record.levelname for record in caplog.records if record.name.startswith("adaptax")] == ["WARNING"]
    assert "earlier checkpoints are whole" in caplog.text
    assert (saver.last_step, steps_in(folder)) == (1, [1])
    assert read_checkpoint(folder.checkpoints / "step_00000001").step == 1
    saver.save(3, small, Progress())
    saver.close()
    assert (saver.failure, saver.last_step, steps_in(folder)) == (None, 3, [1, 3])


def test_a_file_where_the_checkpoints_should_be_is_told(folder: RunFolder, small: TrainState, caplog) -> None:
    folder.checkpoints.write_text("")
    saver = make_saver(folder, small)
    for step in (1, 2):
        saver.save(step, small, Progress())
    saver.close()
    assert saver.failure is not None
    assert saver.last_step is None
    told = [record.getMessage() for record in caplog.records if record.name.startswith("adaptax")]
    assert [text.endswith("there is no earlier checkpoint") for text in told] == [True, True]
    assert folder.checkpoints.read_text() == ""


def test_a_save_that_fails_after_a_resume_knows_the_earlier_checkpoints(folder, small: TrainState, caplog) -> None:
    save_steps(folder, small, 1)
    (folder.checkpoints / "step_00000002.partial").write_text("in the way")
    saver = make_saver(folder, small)
    saver.save(2, small, Progress())
    saver.close()
    assert "earlier checkpoints are whole" in caplog.text


def test_adapters_that_cannot_be_written_do_not_cost_the_checkpoint(folder: RunFolder, small: TrainState) -> None:
    folder.adapters.write_text("in the way")
    saver = make_saver(folder, small, keep=1)
    for step in (1, 2):
        saver.save(step, small, Progress())
    saver.close()
    assert saver.failure is not None
    assert "adapters" in saver.failure
    assert steps_in(folder) == [2]
    assert (saver.last_step, read_checkpoint(folder.checkpoints / "step_00000002").step) == (2, 2)


# Beside the training


def make_wide(num_mib: int) -> TrainState:
    """A state of one large array that does not compress."""
    base = make_state(support.make_mesh(), "sgd", num_updates=0)
    bits = np.random.default_rng(0).integers(0, 2**31 - 2**24, (num_mib, 2**9, 2**9), np.uint32)
    return replace(base, adapters={"wide": jnp.asarray(bits.view(np.float32))}, optimizer=())


def test_a_state_may_be_donated_as_soon_as_save_returns(folder: RunFolder) -> None:
    state = make_wide(8)
    saver = make_saver(folder, state)
    step = jax.jit(
        lambda s: replace(s, adapters={"wide": s.adapters["wide"] * -3.0}, step=s.step + 1), donate_argnums=0
    )
    wanted = {}
    for number in (1, 2):
        wanted[number] = arrays_of(state)
        saver.save(number, state, Progress())
        for _ in range(5):
            state = step(state)
    jax.block_until_ready(state)
    saver.close()
    assert saver.failure is None
    for number, arrays in wanted.items():
        path = folder.checkpoints / f"step_0000000{number}"
        assert_bits(restore(path, read_checkpoint(path), state), arrays)


def test_training_does_not_wait_for_a_save_to_be_written(folder: RunFolder) -> None:
    state = make_wide(48)
    saver = make_saver(folder, state)
    saver.save(1, make_wide(48), Progress())  # waits for its digest to be compiled
    saver.wait()
    started = time.monotonic()
    seconds = saver.save(2, state, Progress())
    waited = time.monotonic() - started
    saver.wait()
    whole = time.monotonic() - started
    saver.close()
    assert saver.failure is None
    assert waited == pytest.approx(seconds, abs=0.1)
    assert waited < whole / 2


def test_saves_are_due_by_steps_and_by_time(folder: RunFolder, small: TrainState, monkeypatch) -> None:
    never, saver = make_saver(folder, small), make_saver(folder, small, every_steps=4, every_minutes=10.0)
    assert [step for step in range(1, 13) if saver.is_due(step)] == [4, 8, 12]
    now = time.monotonic()
    assert not saver.is_time()
    monkeypatch.setattr(time, "monotonic", lambda: now + 601)
    assert saver.is_time()
    assert not never.is_time()
    monkeypatch.undo()
    assert not any(never.is_due(step) for step in range(1, 9))
    saver.save(1, small, Progress())
    assert not saver.is_time()
    saver.close()
    never.close()
