"""The process that libFuzzer runs in: `python -m tests.fuzz.once TARGET [its options]`."""

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["lazyfs"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS

from lazyfs.ground.errors import LazyfsError


def main() -> None:
    program, name, *options = sys.argv
    target = TARGETS[name]

    def once(data: bytes) -> None:
        with suppress(LazyfsError):
            target(data)

    atheris.Setup([program, *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
