"""A file's bytes: extents of a layer's content, in chunks that are fetched once and cached."""
