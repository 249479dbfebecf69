"""Blobs by byte range, wherever they are. Only `http.py` imports requests."""
