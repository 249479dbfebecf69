#!/bin/sh
# Build a lazyfs that needs no Python on the machine it runs on, in a directory of its own:
#
#   contrib/portable/build.sh DEST
#
# It is put together from the Python that $PYTHON names, .venv/bin/python by default (`make setup`
# makes it), in which lazyfs's dependencies must be installed, and from this clone's lazyfs. No
# network is needed. README.md beside this file says what is in it.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
[ -x "$(command -v "$python")" ] || {
    echo "build.sh: no Python at $python: run 'make setup', or name one in PYTHON" >&2
    exit 1
}
exec "$python" -I "$here/build.py" "$@"
