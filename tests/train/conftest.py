"""The fake recipe exists while a file of these tests runs."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def fake_recipe() -> Iterator[None]:
    from tests.train.fake import registered

    with registered():
        yield
