#!/bin/bash
# Build the testbed: a Debian 13 root with CRIU, container engines and a registry, and two small
# programs (wanlink, workload, mover), all in one cache directory outside the repository.
#
#   contrib/testbed/build.sh            as root, or as a user who has sudo
#
# Environment:
#   LAZYFS_TESTBED          the cache directory; default /var/cache/lazyfs-testbed (0.8 GB)
#   LAZYFS_TESTBED_MIRROR   a Debian mirror to use in place of Debian's own
#
# What is built:
#   root/           the Debian 13 root; root/.lazyfs-testbed holds the recipe it was built by
#   bin/            wanlink, workload, mover (static), each beside the source it was built from
# and, by bench/peers.py when it first needs it, from PyPI (testbed/ratarmount.py):
#   ratarmount-*/   a Python environment with ratarmount
#
# Exit codes: 0, all is there; 3, this machine cannot have a testbed (no right to become root, or
# not a Debian or Ubuntu); anything else, an error.
#
# A second run changes nothing and is instant. Two runs at once wait for each other. The root is
# built in root.tmp and renamed when it is complete, so an interrupted run leaves nothing that the
# next one would believe in.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=$(realpath -m "${LAZYFS_TESTBED:-/var/cache/lazyfs-testbed}")
mirror=${LAZYFS_TESTBED_MIRROR:-}

suite=trixie
packages=(
	criu libcriu2 python3-pycriu checkpointctl        # checkpoints
	runc crun podman buildah skopeo                   # engines
	netavark aardvark-dns nftables iptables
	containerd umoci stargz-snapshotter soci-snapshotter
	docker-registry oras nginx-light ca-certificates  # registries and what stands before them
	python3-minimal iproute2 procps fuse3 busybox-static zstd
)
recipe="1 $suite ${packages[*]}"

say() { printf 'testbed: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
impossible() { say "$*"; exit 3; }

if [ "$(id -u)" != 0 ]; then
	command -v sudo >/dev/null || impossible "needs root, and there is no sudo"
	sudo -v || impossible "needs root, and sudo does not grant it"
	say "not root: asking sudo"
	exec sudo env LAZYFS_TESTBED="$cache" LAZYFS_TESTBED_MIRROR="$mirror" "$here/build.sh" "$@"
fi

updated=
# need FILE PACKAGE...: install the packages on this machine unless FILE is there.
need() {
	local file=$1
	shift
	if [ -e "$file" ]; then return; fi
	command -v apt-get >/dev/null ||
		impossible "$file is missing and there is no apt-get to install $* with"
	say "installing $* on this machine"
	export DEBIAN_FRONTEND=noninteractive
	local apt=(apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0 -qq)
	if [ -z "$updated" ]; then "${apt[@]}" update >&2; fi
	updated=yes
	"${apt[@]}" install -y --no-install-recommends "$@" >/dev/null
	[ -e "$file" ] || die "installed $*, but $file is still missing"
}

# remove DIR: a half-built or outdated tree, never what may be mounted in it.
remove() {
	[ ! -e "$1" ] || rm -rf --one-file-system -- "$1"
}

build_root() {
	local root=$cache/root
	if [ "$(cat "$root/.lazyfs-testbed" 2>/dev/null)" = "$recipe" ]; then
		say "root: up to date ($root)"
		return
	fi
	need /usr/bin/mmdebstrap mmdebstrap
	need /usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
	remove "$root.tmp"
	remove "$root.old"
	trap 'remove "$cache/root.tmp"' EXIT
	say "root: building Debian $suite in $root.tmp (about a minute, some 250 MB to download)"
	mmdebstrap --quiet --mode=root --variant=minbase \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--include="$(IFS=,; echo "${packages[*]}")" \
		--aptopt='APT::Install-Recommends "false"' \
		--dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/doc/*' \
		"$suite" "$root.tmp" ${mirror:+"$mirror"} >&2
	mkdir -p "$root.tmp/usr/lib/criu"  # an absent --libdir is an error for CRIU
	printf '%s\n' "$recipe" >"$root.tmp/.lazyfs-testbed"
	[ ! -e "$root" ] || mv -T "$root" "$root.old"
	mv -T "$root.tmp" "$root"
	remove "$root.old"
	say "root: done ($root)"
}

# build_program NAME FLAG...: compile NAME.c unless bin/NAME came from this very source.
build_program() {
	local name=$1
	shift
	local source=$here/$name.c program=$cache/bin/$name
	if [ -x "$program" ] && cmp -s "$source" "$program.c"; then
		say "$name: up to date"
		return
	fi
	need /usr/bin/gcc gcc libc6-dev
	need /usr/include/stdio.h libc6-dev
	mkdir -p "$cache/bin"
	rm -f "$program.c"
	gcc -O2 -Wall -Wextra -std=gnu11 "$@" -o "$program.tmp" "$source"
	mv -T "$program.tmp" "$program"
	cp "$source" "$program.c"
	say "$name: built"
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock --nonblock 9 || { say "another build is running: waiting for it"; flock 9; }

# What the testbed runs on this machine itself, not in the root.
if ! command -v ip >/dev/null; then need /usr/sbin/ip iproute2; fi
if ! command -v nsenter >/dev/null; then need /usr/bin/nsenter util-linux; fi
if ! command -v curl >/dev/null; then need /usr/bin/curl curl; fi
if ! command -v zstd >/dev/null; then need /usr/bin/zstd zstd; fi

build_root
for name in wanlink workload mover; do
	if [ -e "$here/$name.c" ]; then build_program "$name" -static; fi
done
