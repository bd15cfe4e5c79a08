"""Fixtures of the benchmark tests."""

import sys

import pytest

from bench import revision


@pytest.fixture
def base_is_forgotten():
    """The package of another revision is removed from sys.modules after the test, so that the next test can load one."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == revision.NAME]:
        del sys.modules[name]
