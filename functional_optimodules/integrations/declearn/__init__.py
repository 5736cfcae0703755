"""declearn: bricks as its plug-ins, what it saved, and its modules as bricks (extra `declearn`)."""

from functional_optimodules.integrations.declearn.functionalize import functionalize
from functional_optimodules.integrations.declearn.plugins import to_declearn
from functional_optimodules.integrations.declearn.saved import from_declearn_config, from_declearn_state

__all__ = ["from_declearn_config", "from_declearn_state", "functionalize", "to_declearn"]
