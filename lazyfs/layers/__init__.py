"""Layer formats, sans-I/O: bytes in, values out. A new one: a file, a line in `table.py`."""
