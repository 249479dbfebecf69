#!/bin/sh
# Starts @NAME@ from the tree that this file is in, wherever that has been put. Its own ld.so loads
# its own libraries, so it does not matter which C library the machine has, and nothing is set
# in the environment that programs started from here would see.
self=$0
case $self in
    */*) ;;
    *) self=./$self ;;
esac
while [ -L "$self" ]; do
    link=$(readlink "$self")
    case $link in
        /*) self=$link ;;
        *) self=${self%/*}/$link ;;
    esac
done
tree=$(CDPATH='' cd -P -- "${self%/*}/.." && pwd) || exit 1
exec "$tree/lib/lazyfs" --inhibit-cache --library-path "$tree/lib" \
    --argv0 "$tree/python/bin/@PYTHON@" "$tree/python/bin/@PYTHON@" -I -S -B \
    "$tree/app" @NAME@ "$@"
