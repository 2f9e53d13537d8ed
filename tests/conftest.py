"""Settings of the whole test session."""

from collections.abc import Iterator

import pytest
import torch

from distopt.plan import pages
from tests.distributed.pool import close_all


@pytest.fixture(scope="session", autouse=True)
def _end_the_rank_pools() -> Iterator[None]:
    yield
    close_all()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread, as in the ranks that results are compared with, and the same random numbers in every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of states as short as can be, so that there are many."""
    monkeypatch.setattr(pages, "PAGE_BYTES", pages.SECTOR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The import-direction test first: what fails there explains what fails later."""
    items.sort(key=lambda item: item.path.name != "test_imports.py")
