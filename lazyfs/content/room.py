"""How much may be written to the cache."""


class Room:
    """Always room."""

    def take(self, count: int) -> None:
        """Say that `count` bytes are about to be written to a file of the cache.

        Raises:
            OSError: there is no room for them (ENOSPC, EDQUOT).
        """
