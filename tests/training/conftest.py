"""For tests of pages: a headless browser, where one is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, find_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no browser is installed (Debian: apt-get install chromium)")
    with Browser() as opened:
        yield opened
