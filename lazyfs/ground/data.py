"""The one name for bytes that somebody else may own."""

from typing import TypeAlias

Data: TypeAlias = bytes | bytearray | memoryview
"""Bytes to be read, not kept: a view may be of a buffer that is filled anew."""
