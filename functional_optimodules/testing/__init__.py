"""The contract of plug-ins as checks, for authors of bricks to run on their own.

    from functional_optimodules.testing import contract

    CHECKS = dict(contract(MyModule))

    @pytest.mark.parametrize("name", CHECKS)
    def test_my_module_keeps_the_contract(name):
        CHECKS[name]()

Each check is a function of a plug-in that raises an `AssertionError` saying what
is broken and how to mend it. No test framework is needed. Those of a wrapper are of an
optimizer that has it, too.
"""

from functional_optimodules.testing.contract import checks_of, contract
from functional_optimodules.testing.instances import instances

__all__ = ["checks_of", "contract", "instances"]
