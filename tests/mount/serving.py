"""Serves a checkpoint as a restore does, and says on standard output what it sees. A program:

    python -m tests.mount.serving REFERENCE HOME

Each line of standard input is a Python expression about `served`; its answer is printed as JSON.
"""

import json
import os
import sys
from pathlib import Path

from lazyfs.checkpoint.desk import OpenConfig
from lazyfs.content.cache import Cache
from lazyfs.ground.errors import LazyfsError
from lazyfs.ground.settings import CACHE_LIMIT, ContentSettings, TransportSettings
from lazyfs.restore.served import Job, serve


def main() -> None:
    reference, home = sys.argv[1], Path(sys.argv[2])
    settings = TransportSettings(
        plain_http=True, deadline_s=1.0, run_directory=os.environ["LAZYFS_RUN_DIR"]
    )

    def opening() -> OpenConfig:
        return OpenConfig(Cache(home / "cache", CACHE_LIMIT), settings, ContentSettings(), "auto")

    inherited, _ = os.pipe()
    os.set_inheritable(inherited, True)
    try:
        served = serve(Job(reference, opening, home / "served.log", "the container web"))
    except LazyfsError as error:
        print(json.dumps([error.exit_code, str(error)]), flush=True)
        return
    print(json.dumps([0, str(served.path)]), flush=True)
    for line in sys.stdin:
        value = eval(line, {"served": served, "os": os, "Path": Path})
        print(json.dumps(value, default=str), flush=True)
    served.end()


if __name__ == "__main__":
    main()
