"""The fake recipe, for all tests of training."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def fake_recipe() -> Iterator[None]:
    from tests.train.fake import registered

    with registered():
        yield
