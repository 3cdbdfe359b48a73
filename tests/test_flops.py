"""Model FLOPs, against those that the model's own program and its compiled form have; peaks of devices."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import support
from adaptax.devices import peak_flops
from adaptax.flops import Counts, count_documents, count_pairs, split_flops, step_flops
from adaptax.lora import LoraSpec, adapter_shapes, build_model, merge_model
from adaptax.loss import cross_entropy
from adaptax.models import Architecture, find_architecture
from adaptax.models.gemma3_weights import LINEARS, SIZES
from adaptax.step import HEAD
from adaptax.weights import describe_weights

TINY = find_architecture(support.model_config(None, size="tiny"))
B, T = 2, 48


def make_spec(arch: Architecture, layers: range, rank: int = 4) -> LoraSpec:
    """All six kinds, in these layers."""
    return LoraSpec({kind: tuple(layers) for kind in LINEARS}, rank, float(rank))


def trace_loss(arch: Architecture, spec: LoraSpec) -> tuple[Any, tuple[Any, ...]]:
    """(gradient of the loss with nothing computed anew, the shapes of its arguments), every position supervised."""
    mesh = support.make_mesh()
    graphdef = build_model(support.FAMILY, arch, spec, mesh, train=True, remat="none")
    base = describe_weights(None, arch, support.FAMILY.checkpoint, mesh, np.float32)
    shapes = {path: shape for path, (shape, _) in adapter_shapes(support.FAMILY, arch, spec).items()}
    adapters = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    numbers, mask_BT = jax.ShapeDtypeStruct((B, T), np.int32), jax.ShapeDtypeStruct((B, T), bool)

    def loss(adapters: Any, base: Any, numbers_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        model = merge_model(graphdef, base, adapters, spec, np.float32)
        return cross_entropy(model(numbers_BT, numbers_BT, numbers_BT), base[HEAD], numbers_BT, mask_BT, mesh)

    return jax.value_and_grad(loss), (adapters, base, numbers, mask_BT)


def products_of(jaxpr: Any) -> Iterator[int]:
    """The floating-point operations of every matrix product in a program; a scan's as often as it runs."""
    for eqn, times in support.equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[axis] for axis in contracted]
            yield times * 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(sizes)


def dense_counts(arch: Architecture) -> Counts:
    """Of a batch in which attention computes every pair, as the plain one does, masked or not."""
    return Counts(B * T, B * T, {window: B * T * T for window in (None, arch.sliding_window)})


@pytest.mark.parametrize("layers", [range(6), range(2, 6)], ids=["all", "from the third on"])
def test_they_are_the_matrix_products_of_the_program(layers: range) -> None:
    spec = make_spec(TINY, layers)
    function, arguments = trace_loss(TINY, spec)
    counted = sum(products_of(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert step_flops(support.FAMILY, TINY, spec, dense_counts(TINY)) == counted


def test_they_are_those_of_xla_but_for_what_is_no_product() -> None:
    """XLA counts norms and softmax too, and leaves out the gradient that no layer below is there to take: within 5%."""
    arch = replace(TINY, num_layers=1, global_layers=(True,), embed_dim=256, mlp_dim=1024)
    spec = make_spec(arch, range(1))
    function, arguments = trace_loss(arch, spec)
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    ours = step_flops(support.FAMILY, arch, spec, dense_counts(arch))
    assert analysis["flops"] == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 7, 8])
def test_pairs_are_those_of_a_mask(length: int, window: int | None) -> None:
    query, key = np.ogrid[:length, :length]
    mask = (key <= query) & (query - key < (window or length + 1))
    assert count_pairs(length, window) == mask.sum()


def test_how_they_grow() -> None:
    arch, spec = SIZES["270m"], make_spec(SIZES["270m"], range(18), rank=32)

    def split(lengths: list[int], num_supervised: int = 100, spec: LoraSpec = spec) -> dict[str, float]:
        return split_flops(support.FAMILY, arch, spec, count_documents(support.FAMILY, arch, lengths, num_supervised))

    one, two, long = split([512]), split([512] * 2), split([1024])
    assert two["attention"] == 2 * one["attention"] < long["attention"]  # the same tokens see more
    assert two["frozen"] == long["frozen"] == 2 * one["frozen"]
    assert split([512], 300)["head"] == 3 * one["head"]
    above = split([512], spec=make_spec(arch, range(9, 18), rank=32))
    assert above["frozen"] == 0.75 * one["frozen"]  # half of the layers have no backward pass
    assert above["adapters"] == 0.5 * one["adapters"]
    assert split([512], spec=make_spec(arch, range(18), rank=8))["adapters"] == 0.25 * one["adapters"]
    ranks = {f"layers/{layer}/{kind}": 16 for layer in range(9) for kind in LINEARS}
    mixed = replace(make_spec(arch, range(18), rank=32), ranks=ranks)
    assert split([512], spec=mixed)["adapters"] == 0.75 * one["adapters"]  # of each module, its own rank


def test_the_guide_works_its_example_out_right(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "guide" / "performance.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"\.\. code-block:: (?:python|text)\n\n((?:   .*\n|\n)+)", page)
    (i,) = [i for i, block in enumerate(blocks) if "split_flops" in block]
    code, printed = (textwrap.dedent(block).strip() + "\n" for block in blocks[i : i + 2])
    exec(compile(code, "performance.rst", "exec"), {})
    assert capsys.readouterr().out == printed
    parts = 4 * 100_270_080 * 2048, 6 * 7_225_344 * 2048, 12 * 4 * 256 * 12_204_288, 4 * 640 * 262_144 * 1000
    assert [line.split()[1] for line in printed.splitlines()] == [f"{part:.3e}" for part in (*parts, sum(parts))]


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A100 80GB PCIe", 312.0, 19.5),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA L40S", 362.1, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla T4", 8.1, 8.1),
        ("TPU v5 lite", 197.0, None),
        ("TPU v5p", 459.0, None),
        ("TPU v6 lite", 918.0, None),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA H1000", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_of_devices(kind: str, bfloat16: float | None, float32: float | None) -> None:
    for dtype, tflops in (("bfloat16", bfloat16), ("float32", float32), ("float16", None)):
        assert peak_flops(kind, dtype) == (None if tflops is None else tflops * 1e12)
