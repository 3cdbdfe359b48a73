"""What devices can do at best, as their makers say: what a run's speed is held against. No jax here."""

from __future__ import annotations

import re
from pathlib import Path

# (the whole device_kind, as a regular expression; 10^12 operations per second in bfloat16; in float32), per jax device.
# Dense products without sparsity; bfloat16 with sums in float32. float32 is a GPU's plain rate, as TF32 stays off
# (matmul precision "highest"). A laptop's version has another name than a card, and is slower: it is not here.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    # NVIDIA Blackwell architecture datasheet (HGX B200, GB200 NVL72), sparse numbers halved.
    (r"NVIDIA B200", 2250.0, 75.0),
    (r"NVIDIA GB200", 2500.0, 80.0),
    # NVIDIA H100 and H200 datasheets, sparse numbers halved; H100 architecture whitepaper, table 2.
    (r"NVIDIA H200", 989.4, 66.9),
    (r"NVIDIA H200 NVL", 835.5, 60.0),
    (r"NVIDIA GH200 .*", 989.4, 66.9),
    (r"NVIDIA H100 (\d+GB HBM3|SXM.*)", 989.4, 66.9),
    (r"NVIDIA H100 NVL", 835.5, 60.0),
    (r"NVIDIA H100 PCIe", 756.5, 51.0),
    # NVIDIA A100, A30, A40 and A10 datasheets.
    (r"(NVIDIA )?A[18]00[- ].*", 312.0, 19.5),
    (r"NVIDIA A30", 165.0, 10.3),
    (r"NVIDIA A40", 149.7, 37.4),
    (r"NVIDIA A10", 125.0, 31.2),
    # NVIDIA RTX A6000, A5000 and A4000 datasheets, sparse numbers halved; GA102 architecture whitepaper, appendix A.
    (r"(NVIDIA )?RTX A6000", 154.8, 38.7),
    (r"(NVIDIA )?RTX A5000", 111.1, 27.8),
    (r"(NVIDIA )?RTX A4000", 76.7, 19.2),
    (r"(NVIDIA )?GeForce RTX 3090", 71.0, 35.6),
    # NVIDIA L40S, L40 and L4 datasheets; Ada architecture whitepaper, appendices A and B.
    (r"NVIDIA L40S", 362.1, 91.6),
    (r"NVIDIA L40", 181.1, 90.5),
    (r"NVIDIA L4", 121.0, 30.3),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    # NVIDIA V100 and T4 datasheets, Turing architecture whitepaper. Below compute capability 8 there are no units for
    # bfloat16 (CUDA programming guide, "Alternate Floating Point"): it is computed in float32, whose rate this is.
    (r"Tesla V100-SXM[23]-.*", 15.7, 15.7),
    (r"Tesla V100-PCIE-.*", 14.0, 14.0),
    (r"Tesla T4", 8.1, 8.1),
    (r"(NVIDIA )?GeForce RTX 2080 Ti", 13.4, 13.4),
    # cloud.google.com/tpu/docs/v4, v5e, v5p and v6e: peak compute per chip. None is given for float32.
    (r"TPU v4", 275.0, None),
    (r"TPU v5 lite|TPU v5e", 197.0, None),
    (r"TPU v5|TPU v5p", 459.0, None),
    (r"TPU v6 lite|TPU v6e", 918.0, None),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Floating-point operations per second that one device can do at best; None where that is not known.

    Args:
      device_kind: as ``jax.Device.device_kind`` says it.
      dtype: ``bfloat16`` or ``float32``, the type that matrix products are computed in.
    """
    if " MIG " in device_kind:  # a slice of a GPU
        return None
    for pattern, bfloat16, float32 in _PEAKS:
        if re.fullmatch(pattern, device_kind):
            tflops = {"bfloat16": bfloat16, "float32": float32}.get(dtype)
            return None if tflops is None else tflops * 1e12
    return None


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor has instructions for products of bfloat16; False where Linux does not say."""
    try:
        return re.search(r"^flags.*\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False
