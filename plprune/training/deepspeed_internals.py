"""All uses of DeepSpeed's private API. When a release removes a name, `tests/test_internals.py` reports it."""

from typing import Any, cast

COPY_SCRIPT = "_copy_recovery_script"  # a method of the engine that adds a script to a checkpoint


def skip_compilation() -> None:
    """Makes DeepSpeed use torch's operations instead of compiling an all-reduce for a minute."""
    import deepspeed.ops

    cast(Any, deepspeed.ops).__compatible_ops__ = {}
