"""The recipe of the parallel core, for all tests of conformance."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def parallel_core() -> Iterator[None]:
    from tests.conformance.cases import registered

    with registered():
        yield
