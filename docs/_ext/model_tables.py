"""Tables computed from the code: ``model-sizes``, ``adapter-sizes``, ``lora-matches``, ``partition-table``."""

from __future__ import annotations

import dataclasses
import math

import yaml
from config_tables import CONF, list_table
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from adaptax.config import MESH_AXES, ModelConfig
from adaptax.lora import LoraSpec, adapter_shapes
from adaptax.mesh import PARTITION_RULES
from adaptax.models import find_family, match_modules

FAMILY = find_family("gemma3")
SIZES = FAMILY.checkpoint.SIZES
MIB = 2**20


def read_model(name: str) -> ModelConfig:
    """A model of ``conf/model`` over the defaults of ``conf/config.yaml``."""
    values = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["model"]
    return ModelConfig(**values | yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def count_base(size: str) -> int:
    """Parameters of the frozen text model."""
    sizes = FAMILY.checkpoint.axis_sizes(SIZES[size])
    return sum(math.prod(sizes[a] for a in axes) for axes in FAMILY.checkpoint.parameter_axes(SIZES[size]).values())


def count_adapters(config: ModelConfig, rank: int) -> int:
    """Trainable parameters at a rank."""
    arch = SIZES[config.model_size]
    spec = LoraSpec(match_modules(config, arch), rank, float(rank))
    return sum(math.prod(shape) for shape, _ in adapter_shapes(FAMILY, arch, spec).values())


class ModelSizes(SphinxDirective):
    """The numbers of every size."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = []
        for size, arch in SIZES.items():
            numbers = (arch.num_layers, arch.embed_dim, arch.mlp_dim, arch.num_heads, arch.num_kv_heads, arch.head_dim)
            numbers = (*numbers, arch.sliding_window, arch.vocab_size, count_base(size))
            rows.append((f"``{size}``", *(f"{n:,}" for n in numbers)))
        header = [
            "Size",
            "Layers",
            "Hidden",
            "MLP",
            "Query heads",
            "KV heads",
            "Head size",
            "Window",
            "Embedding rows",
            "Parameters",
        ]
        return self.parse_text_to_nodes(list_table(header, rows))


class AdapterSizes(SphinxDirective):
    """``.. adapter-sizes:: 8 16 32``: parameters and memory of the adapters at these ranks."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The table."""
        rows = []
        for name in ("gemma3_270m", "gemma3_1b", "gemma3_4b"):
            config = read_model(name)
            for rank in map(int, self.arguments[0].split()):
                count = count_adapters(config, rank)
                share = f"{count / count_base(config.model_size):.2%}"
                rows.append((f"``{name}``", str(rank), f"{count:,}", share, f"{12 * count / MIB:,.0f} MiB"))
        header = ("Model", "Rank", "Adapter parameters", "Of the base's", "Adapters and AdamW's moments")
        return self.parse_text_to_nodes(list_table(header, rows))


class LoraMatches(SphinxDirective):
    """``.. lora-matches:: gemma3_1b`` with a pattern a line: what each one matches, and in how many layers."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """The table."""
        config, rows = read_model(self.arguments[0]), []
        arch = SIZES[config.model_size]
        for pattern in filter(None, self.content):
            matched = match_modules(dataclasses.replace(config, lora_module_path=pattern), arch)
            kinds = (f"``{kind}`` ({len(layers)} of {arch.num_layers} layers)" for kind, layers in matched.items())
            rows.append((f"``{pattern}``", ", ".join(kinds)))
        return self.parse_text_to_nodes(list_table(("Pattern", "Modules"), rows, "35 65"))


class PartitionTable(SphinxDirective):
    """What fsdp and tp split of every parameter and adapter."""

    def run(self) -> list[nodes.Node]:
        """The table."""
        checkpoint = FAMILY.checkpoint
        arrays = dict(checkpoint.parameter_axes(SIZES["270m"]))
        for kind in checkpoint.LINEARS:
            (in_axis, _), (out_axis, _) = checkpoint.adapter_axes(SIZES["270m"], kind)
            arrays |= {f"layers/{kind}/w_lora_a": f"L{in_axis}R", f"layers/{kind}/w_lora_b": f"LR{out_axis}"}
        rows = []
        for path, axes in arrays.items():
            is_vector = len(axes.lstrip("L")) < 2
            split = [", ".join(a for a in axes if PARTITION_RULES.get(a) == name) for name in MESH_AXES]
            rows.append((f"``{path}``", " ".join(axes), *("" if is_vector else axis for axis in split)))
        return self.parse_text_to_nodes(list_table(("Array", "Axes", *(f"Split by {n}" for n in MESH_AXES)), rows))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    app.add_directive("model-sizes", ModelSizes)
    app.add_directive("adapter-sizes", AdapterSizes)
    app.add_directive("lora-matches", LoraMatches)
    app.add_directive("partition-table", PartitionTable)
    return {"parallel_read_safe": True}
