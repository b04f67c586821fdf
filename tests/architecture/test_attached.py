"""State on modules: read by its type, copied with them, not saved."""

import copy

from torch import nn

from plprune.architecture.attached import attach, attached


def test_state_is_read_by_its_type_and_replaced() -> None:
    module = nn.Linear(2, 2)
    assert attached(module, str) is None
    attach(module, "state")
    assert (attached(module, str), attached(module, int)) == ("state", None)
    attach(module, 7)
    attach(module, "another")
    assert (attached(module, str), attached(module, int)) == ("another", 7)


def test_state_goes_into_copies_but_not_into_the_weights() -> None:
    module = nn.Linear(2, 2)
    attach(module, ["state"])
    assert attached(copy.deepcopy(module), list) == ["state"]
    assert module.state_dict().keys() == {"weight", "bias"}
