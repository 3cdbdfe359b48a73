"""Plain values as a configuration that has been checked as far as that goes without jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptax.config import Config, build, check_divisible, check_training
from adaptax.models import find_architecture, find_family, match_modules, match_patterns
from adaptax.redact import check_no_secrets


def read_config(
    values: Mapping[str, Any], given: Sequence[str] = (), *, is_trained: bool = True, is_saved: bool = False
) -> Config:
    """The configuration as dataclasses; with ``model.init_adapter``, ranks and modules are the adapter's.

    Args:
      values: every key.
      given: the keys that were given on the command line.
      is_trained: whether rows will be trained on, which must be there then.
      is_saved: what was not given is a run's, which has ranks and modules of its ``model.init_adapter`` already.

    Raises:
      UserError: naming what is wrong in it.
    """
    check_no_secrets(values)
    config = build(values, is_trained=is_trained)
    check_training(config)
    is_adopted = is_saved and not {"model", "model.init_adapter"} & set(given)
    if config.model.init_adapter is not None and not is_adopted:
        from adaptax.adapter_files import adopt_initial  # brings numpy and safetensors, which --help does without

        config = replace(config, model=adopt_initial(config.model, given))
    check_model(config)
    if is_trained:
        check_data(config)
    return config


def check_model(config: Config) -> None:
    """Everything about the model that can be found wrong before jax is imported and weights are fetched."""
    family, arch = find_family(config.model.model_family), find_architecture(config.model)
    match_patterns(config.model, match_modules(config.model, arch))
    check_divisible(family.checkpoint.axis_sizes(arch), config.model.mesh_shape)


def check_data(config: Config) -> None:
    """Everything about the data that can be found wrong before a row is read."""
    from adaptax.data import catalog  # brings numpy and sentencepiece, which --help does without

    catalog.check_sources(config)
