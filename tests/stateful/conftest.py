"""What tests of memory share."""

import gc

import pytest


@pytest.fixture
def alive():
    """Return a function that says which references are alive, to objects that are younger than the test."""

    def still(references):
        gc.collect()
        return [reference for reference in references if reference() is not None]

    gc.freeze()  # what is older is not searched, which would take half a second each time
    yield still
    gc.unfreeze()
