"""Whatever a source says, and however often it changes its mind: no reader sees two truths.

Three daemons share a layer whose chunks nothing proves, and each is told something by a source
that lies as it likes. Bits of the cache flip meanwhile. What a reader has once seen at a position
it sees there always, or an error.
"""

import os
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazyfs.content.cache import Cache
from lazyfs.content.cache_file import open_cache_file
from lazyfs.content.holdings import ABSENT, FLYING, READY, UNCHECKED, Holdings
from lazyfs.ground.counters import Counters
from lazyfs.ground.digest import Digest
from lazyfs.ground.errors import IntegrityError
from lazyfs.ground.ranges import ByteRange
from lazyfs.layers.chunks import FixedChunks

CHUNK = 64
COUNT = 4
DAEMONS = 3
DIGEST = Digest.of(b"the layer")
daemon_numbers = st.integers(0, DAEMONS - 1)
chunk_numbers = st.integers(0, COUNT - 1)
versions = st.integers(0, 2)


def chunk_bytes(index: int, version: int) -> bytes:
    return bytes([index * 16 + version]) * CHUNK


class Daemon:
    """What one daemon holds, driven as `LayerContent` drives it."""

    def __init__(self, directory: Path) -> None:
        chunks = FixedChunks(CHUNK * COUNT, CHUNK)
        self.cache = open_cache_file(Cache(directory), DIGEST, "t", CHUNK * COUNT, COUNT)
        self.holdings = Holdings(chunks, self.cache, Counters(), 2 * CHUNK, "a liar")
        self.seen: dict[int, bytes] = {}
        self.condemned = False

    def fetch(self, first: int, pieces: list[bytes]) -> None:
        claimed = [self.holdings.claim(first + at) for at in range(len(pieces))]
        try:
            if not all(claimed):
                return
            claimed = [False] * len(pieces)
            try:
                marks, memory = self.holdings.store(first, pieces)
            except IntegrityError:
                self.condemn()
                return
            if not self.holdings.publish(first, marks, memory):
                self.condemn()
        finally:
            for at, is_claimed in enumerate(claimed):
                if is_claimed:
                    self.holdings.unclaim(first + at)

    def check(self, index: int) -> None:
        mark = self.holdings.mark(index)
        self.holdings.state[index] = FLYING
        if self.holdings.verify(index, mark):
            assert self.holdings.accept(index, mark)
        else:
            self.holdings.refuse(index, mark)

    def condemn(self) -> None:
        self.condemned = True
        self.holdings.purge()

    def look(self) -> None:
        if self.condemned:
            return
        for index in range(COUNT):
            content = ByteRange(index * CHUNK, (index + 1) * CHUNK)
            part = self.holdings.part(index, content)
            if part is not None:
                assert self.seen.setdefault(index, bytes(part)) == bytes(part)


class OneTruth(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.daemons = [Daemon(Path(self.directory.name)) for _ in range(DAEMONS)]

    @rule(number=daemon_numbers, first=chunk_numbers, said=st.lists(versions, min_size=1))
    def fetched(self, number: int, first: int, said: list[int]) -> None:
        daemon = self.daemons[number]
        last = min(COUNT, first + len(said))
        wanted = range(first, last)
        if not daemon.condemned and all(daemon.holdings.state[at] == ABSENT for at in wanted):
            pieces = zip(wanted, said, strict=False)
            daemon.fetch(first, [chunk_bytes(index, version) for index, version in pieces])

    @rule(number=daemon_numbers)
    def news_are_looked_at(self, number: int) -> None:
        self.daemons[number].holdings.refresh(0, COUNT)

    @rule(number=daemon_numbers, index=chunk_numbers)
    def checked(self, number: int, index: int) -> None:
        daemon = self.daemons[number]
        if daemon.holdings.state[index] == UNCHECKED:
            daemon.check(index)

    @rule(number=daemon_numbers)
    def replaced(self, number: int) -> None:
        self.daemons[number].holdings.close()
        self.daemons[number] = Daemon(Path(self.directory.name))

    @rule(number=daemon_numbers)
    def proof_is_learnt_of(self, number: int) -> None:
        self.daemons[number].holdings.learn_seal()

    @precondition(lambda self: all(not daemon.condemned for daemon in self.daemons))
    @rule(number=daemon_numbers)
    def sealed(self, number: int) -> None:
        """Of what it holds; that its blob has the right digest is not this test's."""
        holdings = self.daemons[number].holdings
        if all(state >= READY for state in holdings.state):
            holdings.seal()

    @rule(index=chunk_numbers, bit=st.integers(0, 7))
    def flipped(self, index: int, bit: int) -> None:
        """A bit of a chunk's bytes that nobody has been shown yet."""
        if any(index in each.seen for each in self.daemons):
            return
        for home in Path(self.directory.name).glob("layers/*"):
            with open(home / "content", "r+b", buffering=0) as file:
                was = os.pread(file.fileno(), 1, index * CHUNK)
                os.pwrite(file.fileno(), bytes([was[0] ^ (1 << bit)]), index * CHUNK)

    @rule(index=chunk_numbers, mark=st.binary(min_size=8, max_size=8).filter(any))
    def mark_is_damaged(self, index: int, mark: bytes) -> None:
        for home in Path(self.directory.name).glob("layers/*"):
            with open(home / "marks", "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), mark, index * 8)

    @invariant()
    def nobody_sees_two_truths(self) -> None:
        for daemon in self.daemons:
            daemon.look()

    def teardown(self) -> None:
        for daemon in self.daemons:
            daemon.holdings.close()
        self.directory.cleanup()


TestOneTruth = OneTruth.TestCase
TestOneTruth.settings = settings(max_examples=150, stateful_step_count=40)
