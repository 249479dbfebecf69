#!/bin/bash
# Run a command in the testbed's Debian 13 root, as container engines need it: a mount and a pid
# namespace of its own, and the root pivoted into (CRIU refuses a mere chroot).
#
#   contrib/testbed/enter.sh [-b FOLDER]... [COMMAND [ARGUMENT]...]       as root; default: a shell
#
#   -b FOLDER    show this folder of the host at the same place inside, with what is mounted below
#                it now; later mounts on either side are not seen on the other
#
# Network, /dev but /dev/shm, and /sys (and so cgroups) are the host's. Everything else that is written goes to
# memory and is gone when the command ends, as are all its processes and mounts; the root itself
# stays as it was built, and several commands at once do not see each other.
set -euo pipefail

die() { echo "enter.sh: $*" >&2; exit 1; }

if [ "${1:-}" != --inside ]; then
	cache=$(realpath -m "${LAZYFS_TESTBED:-/var/cache/lazyfs-testbed}")
	[ "$(id -u)" = 0 ] || die "needs root"
	[ -e "$cache/root/.lazyfs-testbed" ] || die "no testbed in $cache: run build.sh"
	exec unshare --mount --pid --fork --kill-child --propagation private \
		bash "${BASH_SOURCE[0]}" --inside "$cache/root" "$@"
fi

lower=$2
shift 2
folders=()
while getopts b: option; do
	case $option in
	b) folders+=("$(realpath -e "$OPTARG")") ;;
	*) exit 2 ;;
	esac
done
shift $((OPTIND - 1))

# A tmpfs, in our own mount namespace, for an overlay's layers and for the new root.
place=${lower%/root}/enter
mkdir -p "$place"
mount -t tmpfs -o mode=755 tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=$lower,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p var/lib/containers
mount -t tmpfs -o mode=711 tmpfs var/lib/containers  # Podman's overlays cannot be on an overlay
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 tmpfs dev/shm  # Podman's locks are there: each root has its own
for folder in "${folders[@]}"; do
	mkdir -p ".$folder"
	mount --rbind "$folder" ".$folder"
done
pivot_root . mnt
umount -l /mnt
cd /
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export PODMAN_IGNORE_CGROUPSV1_WARNING=1
unset TMPDIR LD_LIBRARY_PATH LD_PRELOAD
if [ $# = 0 ]; then set -- bash; fi
exec "$@"
