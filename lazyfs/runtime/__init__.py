"""The OCI runtime wrapper: a restore of a stub becomes one of the real image.

Stands behind `lazyfs-runtime` (a script of the package), which hands everything else to the real
runtime without coming here. Two processes work on a restore: the *front* (`front.py`), which the
engine has started and waits for, runs the real runtime as its child; the *keeper* (`keeper.py`), in
a session of its own, holds the mount, judges what came up, and ends what a killed front leaves.
"""
