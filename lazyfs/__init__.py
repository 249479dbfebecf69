"""lazyfs: a remote checkpoint image's CRIU directory, mounted before it has been downloaded.

The floors, from the door to the ground; imports go down only (see ARCHITECTURE.md):

    cli, mount, fuse   what a person or an engine touches
    checkpoint         reference -> manifest -> layer -> the tree that is shown
    content            a file's bytes: chunks, cache, readahead
    layers             layer formats, sans-I/O
    transport          blobs by byte range
    ground             digests, ranges, errors, settings, counters
"""

__version__ = "0.1.0"
