"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving_processes import Serving, serving


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Agents and app on the stand-in model, for all tests that leave them as they were."""
    with serving(tmp_path_factory.mktemp("standin")) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def client(standin: Serving) -> httpx.Client:
    """An HTTP client of ``standin``."""
    return standin.client()
