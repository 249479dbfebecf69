"""Restoring: a checkpoint mounted nowhere, the program that restores it, and what comes after.

Above `mount.py`: it starts a mount's daemon, hands CRIU or a container runtime the directory,
sees to the pages that come later, judges whether what came up may live, and leaves nothing behind.
"""
