#!/usr/bin/env bash
# System packages and the virtual environment .venv, as far as they are missing. Quick when not.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else
        echo "setup: '$*' needs root, and there is no sudo; run it as root and try again" >&2
        exit 1
    fi
}

# pyfuse3 is built from source: libfuse3's headers, pkg-config, a compiler, Python's headers.
needed=(python3 python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3 ca-certificates)
missing=()
for package in "${needed[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok installed' ||
        missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        "${missing[@]}" >/dev/null
fi

# fusermount3 wants to know what is mounted; minimal images lack the link.
[ -e /etc/mtab ] || as_root ln -s ../proc/self/mounts /etc/mtab

# Made anew when what it is made from has changed.
want=$(sha256sum pyproject.toml | cut -d' ' -f1)
if [ "$(cat .venv/.ready 2>/dev/null)" != "$want" ]; then
    echo "setup: making .venv (up to a minute)"
    python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: Python 3.11 or later is needed, $("$python" --version) is here" >&2
        exit 1
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
    .venv/bin/python -m pip install -q --disable-pip-version-check -e . --group dev
    echo "$want" >.venv/.ready
fi

# An editable install has no scripts but its entry points; a wheel brings these along.
for name in lazyfs-runtime lazyfs-runc lazyfs-crun; do
    ln -sf "../../contrib/runtime/$name" ".venv/bin/$name"
done

# Each command is a process of its own; where PYTHONDONTWRITEBYTECODE is set it would compile all of
# lazyfs each time.
.venv/bin/python -m compileall -q lazyfs tests contrib/testbed || true
