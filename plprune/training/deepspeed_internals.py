"""The private parts of DeepSpeed that are used: no other module touches one.

A new release may remove any of them; `tests/test_internals.py` then says by name which is gone.
"""

from typing import Any, cast

COPY_SCRIPT = "_copy_recovery_script"  # an engine's method, which adds a script to a checkpoint


def compile_nothing() -> None:
    """Has DeepSpeed take torch's operations, where it would compile an all-reduce of its own for a minute."""
    import deepspeed.ops

    cast(Any, deepspeed.ops).__compatible_ops__ = {}
