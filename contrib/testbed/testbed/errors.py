"""What can go wrong in the testbed."""

from __future__ import annotations


class TestbedError(Exception):
    """A part of the testbed did not do what was asked of it."""

    __test__ = False  # not a test class, whatever pytest makes of its name


class TestbedMissing(TestbedError):
    """This machine has no testbed, or cannot run one; the message says why and what to do."""
