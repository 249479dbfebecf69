"""zstd frames, decompressed one after the other into memory of the caller's."""

import zstandard

from lazyfs.ground.data import Data
from lazyfs.ground.errors import IntegrityError
from lazyfs.layers.deflate import Buffer
from lazyfs.layers.plain_zstd import WINDOW_MOST_BYTES


class Unzstd:
    """Decompresses frames; used by one thread at a time."""

    def __init__(self, data: Data) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_MOST_BYTES)
        self._reader = decompressor.stream_reader(data, read_across_frames=True)

    def unpack(self, out: Buffer, start: int, stop: int) -> int:
        """Fill `out[start:stop]` and return its size; less only where the data ends.

        Raises:
            IntegrityError: it is no zstd.
        """
        filled = start
        try:
            while filled < stop:
                got = self._reader.readinto(out.view[filled:stop])
                if not got:
                    break
                filled += got
        except zstandard.ZstdError as err:
            raise IntegrityError(f"zstd data does not decompress: {err}") from err
        return filled - start
