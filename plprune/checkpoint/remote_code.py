"""Families whose code comes with their models: run only if the user allows it.

The classes are registered with transformers for this process. From then on the family is like any that transformers
has, and its code is saved beside pruned models.
"""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from plprune.architecture.modeling_plprune import NEEDED, PrunedConfig, register
from plprune.checkpoint.locate import resolve_path

log = logging.getLogger(__name__)
_ALLOWED: set[str] = set()  # names of models


def allow_remote_code(*names: str) -> None:
    """Allows models to run the Python files that come with them, for as long as this process lives.

    Call it before the models are loaded. Read the files first: they can do whatever you can. Files of a family that
    transformers has are not run, as its own class is taken.

    Args:
        names: Folders, or names on the hub.

    Raises:
        ValueError: There are no such files, or they have no causal language model.
    """
    for name in names:
        if name in _ALLOWED or resolve_path(name).suffix == ".gguf":
            continue
        values = PreTrainedConfig.get_config_dict(name)[0]
        kind, auto = values.get("model_type", ""), values.get("auto_map") or {}
        if kind == PrunedConfig.model_type:
            get_class_from_dynamic_module(auto[NEEDED[0]], name)  # which registers the family, if its code is there
        elif kind in CONFIG_MAPPING:
            log.info("%s: transformers has a class for %s, so code of the model is not needed", name, kind)
        elif missing := [each for each in NEEDED if each not in auto]:
            raise ValueError(f"{name} has no code of its own for {missing[0]}: leave trust_remote_code out")
        else:
            register(*(get_class_from_dynamic_module(auto[each], name) for each in NEEDED))
        _ALLOWED.add(name)


def is_allowed(name: str) -> bool:
    """Whether the user allowed a model to run its Python files."""
    return name in _ALLOWED


def check_allowed(name: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError if a model needs code of its own that was not allowed.

    Args:
        name: Of the model.
        values: Its `config.json`, or that of the model that it was pruned from.
    """
    if values.get("auto_map") and values.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} comes with code of its own, which runs only if you allow it: read its Python files, then give "
            f"--trust_remote_code, or in Python call plprune.allow_remote_code({name!r}) first"
        )
