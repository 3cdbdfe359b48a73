"""Packed rows are to the model what they are alone: losses, gradients, and nothing seen of a neighbour."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import support
from adaptax.data.chat import Example
from adaptax.data.pipeline import BatchSource, Dataset, pad_batch
from adaptax.data.store import Counts, Examples, TokenStore
from adaptax.lora import Arrays, merge_model
from adaptax.loss import cross_entropy
from adaptax.models.gemma3_weights import SIZES, Architecture
from adaptax.step import HEAD
from rows import Batch, documents

WINDOW, CAPACITY, VOCAB_SIZE = 8, 64, 512
LAYERS = {"local": (False, False), "global": (True, True), "both": (False, True)}
EVERY_KIND = pytest.mark.parametrize("layers", LAYERS)
EVERY_KIND_SLOWLY = pytest.mark.parametrize(
    "layers", [name if name == "both" else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)


def make_arch(layers: str = "both") -> Architecture:
    """Two small layers, with a window that is shorter than most documents."""
    small = {"num_layers": 2, "embed_dim": 64, "mlp_dim": 128, "vocab_size": VOCAB_SIZE, "sliding_window": WINDOW}
    return replace(SIZES["tiny"], global_layers=LAYERS[layers], **small)


@functools.cache
def make_weights() -> tuple[Arrays, Arrays]:
    """(base, adapters with a B that is not zero), the same for each kind of layers."""
    arch, mesh = make_arch(), support.make_mesh()
    return support.load(None, arch, mesh), support.random_adapters(arch, support.full_spec(arch), mesh)


class Model:
    """A program with its weights, and adapters that do something."""

    def __init__(self, layers: str):
        arch, mesh = make_arch(layers), support.make_mesh()
        spec = support.full_spec(arch)
        self.program = support.make_program(arch, spec, mesh)
        self.base, self.adapters = make_weights()
        self._hidden = jax.jit(self._run)
        self._gradient = jax.jit(jax.value_and_grad(self._loss))

    def _run(self, adapters: Arrays, base: Arrays, batch: Any) -> jax.Array:
        model = merge_model(self.program.graphdef, base, adapters, self.program.spec, self.program.adapter_dtype)
        return model(batch["tokens"], batch["positions"], batch["segments"], dtype=self.program.dtype)

    def _loss(self, adapters: Arrays, base: Arrays, batch: Any) -> jax.Array:
        hidden = self._run(adapters, base, batch)
        return cross_entropy(hidden, base[HEAD], batch["targets"], batch["loss_mask"], self.program.mesh)

    def hidden(self, batch: Batch) -> np.ndarray:
        """Hidden states of a batch of one micro-batch, [1, B, T, D]."""
        return np.asarray(self._hidden(self.adapters, self.base, {n: a[0] for n, a in batch.items()}))[None]

    def losses(self, batch: Batch) -> np.ndarray:
        """Negative log likelihood of every target, trained or not, [1, B, T]."""
        logits = jnp.asarray(self.hidden(batch)) @ self.base[HEAD].T
        return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch["targets"])))

    def gradient(self, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
        """(summed loss, its gradient by adapter)."""
        loss, gradient = self._gradient(self.adapters, self.base, {n: a[0] for n, a in batch.items()})
        return float(loss), {path: np.asarray(array) for path, array in gradient.items()}


build = functools.cache(Model)  # compiled once for all tests


@functools.cache
def make_data() -> Dataset:
    """24 documents of 3 to 30 tokens, half of them trained."""
    rng = np.random.default_rng(0)
    examples = []
    for length in rng.integers(3, 31, 24):
        tokens = np.append(2, rng.integers(4, VOCAB_SIZE, length - 1)).astype(np.int32)
        examples.append(Example(tokens, np.append(False, rng.random(length - 1) < 0.5)))
    return Dataset(Examples([TokenStore.of("rows", "text", examples, Counts())]))


def whole_batch(packing: bool) -> Batch:
    """All rows as one batch of the pipeline: packed, or a row to a sequence."""
    values: dict[str, Any] = {"buckets": np.array([CAPACITY if packing else 32]), "packing": packing, "shuffle": True}
    size = BatchSource(make_data(), num_micro=1, batch_size=1, **values).steps_per_epoch
    return BatchSource(make_data(), num_micro=1, batch_size=size, **values)[0]


def by_document(batch: Batch, values: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """The values of a batch by the tokens of the document they stand in."""
    named = {"tokens": batch["tokens"], "segments": batch["segments"], "values": values}
    return {tuple(tokens.tolist()): arrays["values"] for tokens, arrays in documents(named)}


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    """Every gradient differs by at most this share of its length."""
    assert ours.keys() == theirs.keys()
    for path in ours:
        norm = np.linalg.norm(theirs[path])
        assert norm > 0, path
        assert np.linalg.norm(ours[path] - theirs[path]) <= tolerance * norm, path


@EVERY_KIND_SLOWLY
def test_packed_rows_have_the_losses_they_have_alone(layers: str) -> None:
    packed, alone = (whole_batch(packing) for packing in (True, False))
    assert packed["tokens"].shape[1] < alone["tokens"].shape[1] / 2
    assert max(len(tokens) for tokens, _ in documents(packed)) > 3 * WINDOW
    ours, theirs = (by_document(batch, build(layers).losses(batch)) for batch in (packed, alone))
    assert len(ours) == len(theirs) == len(make_data().examples)
    for key in theirs:
        assert np.abs(ours[key][:-1] - theirs[key][:-1]).max() <= 1e-5
    assert np.std(np.concatenate(list(theirs.values()))) > 0.1  # they are not all the same anyway


@EVERY_KIND_SLOWLY
def test_packed_rows_have_the_gradient_they_have_alone(layers: str) -> None:
    (loss, ours), (expected, theirs) = (build(layers).gradient(whole_batch(packing)) for packing in (True, False))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert {path[-2:] for path in ours} == {"_a", "_b"}
    assert_close(ours, theirs, 1e-5)


@pytest.mark.slow
def test_a_training_step_of_packed_rows_is_that_of_the_rows_alone() -> None:
    arch, mesh = make_arch(), support.make_mesh()
    base, spec = make_weights()[0], support.full_spec(arch)
    metrics = []
    for packing in (True, False):
        adapters = jax.tree.map(jnp.copy, make_weights()[1])  # a step takes its own away
        trainer = support.Trainer(arch, base, spec, mesh, support.optimizer_config("sgd"), adapters)
        metrics.append(trainer.run(whole_batch(packing)))
    ours, theirs = metrics
    assert ours["num_supervised"] == theirs["num_supervised"] == make_data().num_supervised
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


# Neighbours


def three_documents(poison: int | None = None) -> Batch:
    """A sequence of documents of 20, 24 and 16 tokens, and padding; ``poison`` draws new tokens for all but the 24."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, VOCAB_SIZE, n).astype(np.int32) for n in (20, 24, 16)]
    shape = whole_batch(packing=True)["tokens"].shape  # compiled already
    empty: list[list[Any]] = [[]] * (shape[1] - 1)
    batch = pad_batch([[(row, np.arange(len(row)) > 0) for row in rows], *empty], shape)
    if poison is not None:
        others = batch["segments"] != 2
        drawn = np.random.default_rng(100 + poison).integers(4, VOCAB_SIZE, shape)
        assert (drawn != batch["tokens"])[others].mean() > 0.9
        batch["tokens"] = np.where(others, drawn, batch["tokens"]).astype(np.int32)
    return batch


@EVERY_KIND
def test_nothing_is_seen_of_the_documents_before_and_after(layers: str) -> None:
    model, clean = build(layers), three_documents()
    here = clean["segments"] == 2
    expected = model.hidden(clean)
    for seed in range(3):
        hidden = model.hidden(three_documents(seed))
        np.testing.assert_allclose(hidden[here], expected[here], rtol=0, atol=1e-6)
        assert np.abs(hidden[~here] - expected[~here]).max() > 0.1  # the others did change


@EVERY_KIND
def test_as_one_document_the_neighbours_would_be_seen(layers: str) -> None:
    """What the test above would find: the same tokens without segments and positions of their own."""
    model, clean = build(layers), three_documents()
    here = clean["segments"] == 2
    running = np.broadcast_to(np.arange(CAPACITY, dtype=np.int32), clean["positions"].shape)
    one = {"segments": np.ones_like(clean["segments"]), "positions": running}
    hidden = [model.hidden(batch | one) for batch in (clean, three_documents(0))]
    assert np.abs(hidden[0][here] - hidden[1][here]).max() > 1e-2


@EVERY_KIND_SLOWLY
def test_the_gradient_of_a_document_has_nothing_of_its_neighbours(layers: str) -> None:
    batches = [three_documents(), three_documents(0)]
    for batch in batches:
        batch["loss_mask"] &= batch["segments"] == 2
        assert batch["loss_mask"].sum() == 23
    (loss, ours), (expected, theirs) = (build(layers).gradient(batch) for batch in batches)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_close(ours, theirs, 1e-6)
