"""Words and numbers for a terminal. Names in a checkpoint are anybody's: none reaches it raw."""

from lazyfs.ground.printable import printable
from lazyfs.ground.words import human_bytes, plural

__all__ = ["human_bytes", "plural", "printable"]
