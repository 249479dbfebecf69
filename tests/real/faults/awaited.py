"""What lazyfs cannot do yet: tests of it are written, and begin to run when it is said here.

Nothing else decides it. A test that is held back says which line of this file would free it.
"""

import pytest

MIRRORS = True
"""A mirror that dies, stalls or lies is left for the next place, named by registries.conf."""
SHARED_CACHE = False
"""All daemons of a host share the files of one layer at once."""
CACHE_SIZE = False
"""`--cache-size` bounds the cache, and layers that nobody uses are evicted."""


def needs_mirrors() -> pytest.MarkDecorator:
    """Hold a test back until there are mirrors."""
    return _needs(MIRRORS, "MIRRORS")


def needs_shared_cache() -> pytest.MarkDecorator:
    """Hold a test back until a layer's files are shared."""
    return _needs(SHARED_CACHE, "SHARED_CACHE")


def needs_cache_size() -> pytest.MarkDecorator:
    """Hold a test back until the cache is bounded."""
    return _needs(CACHE_SIZE, "CACHE_SIZE")


def _needs(there: bool, name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not there, reason=f"lazyfs has not got {name} (awaited.py) yet")
