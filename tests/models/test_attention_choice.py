"""Which implementation of attention is taken, and what is said where one cannot be had."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import small_runs
from adaptax.models.attention import build_masks, choose_attention
from adaptax.models.gemma3_weights import SIZES
from adaptax.schema import UserError


@dataclass(frozen=True)
class Device:
    """As much of a device as the choice depends on."""

    platform: str
    compute_capability: str = ""


CPU, TPU = Device("cpu"), Device("tpu")
AMPERE, HOPPER, BLACKWELL = (Device("gpu", capability) for capability in ("8.0", "9.0", "10.0"))
VOLTA, AMD = Device("gpu", "7.0"), Device("gpu", "gfx942")


@pytest.mark.parametrize(
    ("device", "size", "dtype", "is_packed", "taken"),
    [
        (CPU, "1b", "float32", True, "xla"),
        (CPU, "tiny", "bfloat16", False, "xla"),
        (HOPPER, "1b", "bfloat16", False, "cudnn"),
        (HOPPER, "1b", "bfloat16", True, "xla"),
        (HOPPER, "1b", "float32", False, "xla"),
        (BLACKWELL, "1b", "bfloat16", False, "xla"),
        (BLACKWELL, "27b", "bfloat16", False, "cudnn"),
        (AMPERE, "1b", "bfloat16", False, "xla"),
        (AMPERE, "27b", "bfloat16", False, "cudnn"),
        (VOLTA, "27b", "bfloat16", False, "xla"),
        (AMD, "27b", "bfloat16", False, "xla"),
        (TPU, "1b", "bfloat16", True, "splash"),
        (TPU, "tiny", "bfloat16", True, "xla"),
    ],
)
def test_auto_takes_what_is_sure_to_work(device: Device, size: str, dtype: str, is_packed: bool, taken: str) -> None:
    assert choose_attention("auto", device, SIZES[size], jnp.dtype(dtype), is_packed=is_packed) == taken


@pytest.mark.parametrize(
    ("name", "device", "size", "dtype", "is_packed", "problem"),
    [
        ("cudnn", CPU, "1b", "bfloat16", False, "needs an NVIDIA GPU; this run is on cpu: take auto or xla"),
        ("cudnn", AMD, "1b", "bfloat16", False, "needs an NVIDIA GPU; this run is on gpu: take auto or xla"),
        ("cudnn", VOLTA, "1b", "bfloat16", False, "needs .* compute capability 8.0 or more; this one has 7.0: take"),
        ("cudnn", AMPERE, "1b", "bfloat16", False, "takes heads .* up to 128 .* 8.0, the model's are 256: take auto"),
        (
            "cudnn",
            HOPPER,
            "1b",
            "float32",
            False,
            "computes in bfloat16, not float32: set model.dtype=bfloat16, or",
        ),
        (
            "cudnn",
            HOPPER,
            "1b",
            "bfloat16",
            True,
            "sees no border .* sequence: set data.packing=false, or take auto",
        ),
        ("splash", HOPPER, "1b", "bfloat16", False, "needs a TPU; this run is on gpu: take auto or xla"),
        ("splash", TPU, "tiny", "bfloat16", False, "takes heads of a multiple of 128, the model's are 32: take auto"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason_and_the_way_out(
    name: str, device: Device, size: str, dtype: str, is_packed: bool, problem: str
) -> None:
    with pytest.raises(UserError, match=rf"^model\.attention={name} {problem}") as caught:
        choose_attention(name, device, SIZES[size], jnp.dtype(dtype), is_packed=is_packed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plain", "xla"])
@pytest.mark.parametrize("device", [CPU, VOLTA, TPU], ids=lambda device: device.platform)
def test_what_runs_everywhere_is_taken_as_asked_for(name: str, device: Device) -> None:
    assert choose_attention(name, device, SIZES["tiny"], jnp.float32, is_packed=True) == name


def test_a_run_says_before_it_reads_rows_that_it_cannot_have_what_is_asked_for(tmp_path: Path) -> None:
    config = small_runs.make_config(small_runs.write_home(tmp_path), {"model.attention": "splash"})
    with pytest.raises(UserError, match="model.attention=splash needs a TPU; this run is on cpu"):
        small_runs.train(tmp_path / "run", config)


def test_short_sequences_and_float32_beside_cudnn_get_what_serves_them() -> None:
    def taken(kind: str, length: int, dtype: Any) -> str:
        rows, build = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2, functools.partial(build_masks, dtype=dtype)
        return jax.eval_shape(functools.partial(build, window=8, implementation=kind), *rows)[0].implementation

    assert taken("xla", 256, jnp.float32) == "plain"
    assert taken("xla", 257, jnp.float32) == "xla"
    assert taken("cudnn", 512, jnp.bfloat16) == "cudnn"
    assert taken("cudnn", 512, jnp.float32) == "xla"  # a batch that is replayed in float32
