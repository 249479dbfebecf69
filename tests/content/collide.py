"""Other bytes with the same unseeded xxh3, made in no time: it is no cryptographic hash.

Of input longer than 240 bytes each stripe (64 bytes, 8 lanes) of a block (1024 bytes) adds, for
each lane's word d and key k, the halves' product of d ^ k to the lane's accumulator, and d to its
neighbour's. Words whose product is 0 give the neighbour any sum that is wanted. Source: the xxHash
specification, "XXH3 Algorithm (for long inputs)".
"""

import struct

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578"
)
_LOW = (1 << 32) - 1
_ALL = (1 << 64) - 1


def collide(data: bytes, word: bytes) -> bytes:
    """Return `data` that begins with another word, and has the same xxh3 (64 bits, seed 0)."""
    words = list(struct.unpack_from("<24Q", data))
    other = list(words)
    (other[0],) = struct.unpack("<Q", word)
    for lane in (0, 1):
        for stripe in (1, 2):
            other[8 * stripe + lane] = 0
    before, now = _sums(words), _sums(other)
    for lane in (0, 1):  # a word of no product is a key in one half, and adds what `now` lacks
        first, second = _key(1, lane), _key(2, lane)
        for stripe in (1, 2):  # 0 had a product
            now[lane] -= _product(0, stripe, lane)
        wanted = before[1 - lane] - now[1 - lane]
        if lane == 0:
            wanted += sum(_product(0, stripe, 1) for stripe in (1, 2))
        low = (wanted - (first & _LOW)) & _LOW
        high = (wanted - (first & _LOW) - low - (second >> 32 << 32)) & _ALL
        other[8 + lane] = (high & ~_LOW) | (first & _LOW)
        other[16 + lane] = (second >> 32 << 32) | low
    return struct.pack("<24Q", *other) + data[192:]


def _key(stripe: int, lane: int) -> int:
    (key,) = struct.unpack_from("<Q", _SECRET, 8 * (stripe + lane))
    return int(key)


def _product(word: int, stripe: int, lane: int) -> int:
    mixed = word ^ _key(stripe, lane)
    return (mixed & _LOW) * (mixed >> 32)


def _sums(words: list[int]) -> list[int]:
    """Return what the first three stripes add to the first two lanes' accumulators."""
    sums = [0, 0]
    for stripe in range(3):
        for lane in (0, 1):
            word = words[8 * stripe + lane]
            sums[lane] += _product(word, stripe, lane)
            sums[1 - lane] += word
    return sums
