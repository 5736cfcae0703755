"""What tests of memory share."""

import gc

import pytest

from functional_optimodules.wire.limits import set_limits


@pytest.fixture
def alive():
    """Return a function that says which references are alive, to objects that are younger than the test."""

    def still(references):
        gc.collect()
        return [reference for reference in references if reference() is not None]

    gc.freeze()  # what is older is not searched, which would take half a second each time
    yield still
    gc.unfreeze()


@pytest.fixture
def limiting():
    """Return `set_limits`, whose effect ends with the test."""
    yield set_limits
    set_limits(None)
