"""Room for the cache's bytes."""


class Room:
    """Always room."""

    def take(self, count: int) -> None:
        """Take room for `count` bytes that are about to be written.

        Raises:
            OSError: there is none.
        """
