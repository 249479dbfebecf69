"""Colours and letters that all figures share; colour-blind-safe, and the same for the same thing.

After the palettes of Okabe and Ito ("Color Universal Design", 2008) and Tol ("Colour Schemes",
2021): blue against vermilion and gold, told apart by lightness too.
"""

FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", '
    '"Liberation Sans", sans-serif'
)
INK = "#1f2a37"
QUIET = "#667485"
FAINT = "#d9dfe6"
PAPER = "#ffffff"

DEMAND = "#dfa022"
READAHEAD = "#2f6fb5"
COMPLETION = "#9dbbd9"
INDEX = "#5b9e97"
OTHER = "#b3bcc7"
LATE = "#c8442b"
IN_TIME = "#1d4f8a"
SPARE = "#d3dae2"
START = INDEX
CRIU = "#8d7fb3"
RUNNING = "#c6ccd4"

LANES = {
    "index": INDEX,
    "demand": DEMAND,
    "readahead": READAHEAD,
    "completion": COMPLETION,
}
"""Of fetches, in the order in which they are stacked."""

CAUSES = {
    "queue_ms": "#6b5a2a",
    "behind_ms": "#a9472f",
    "first_byte_ms": DEMAND,
    "transfer_ms": READAHEAD,
    "decoding_ms": INDEX,
    "answering_ms": CRIU,
    "unknown_ms": OTHER,
}

TIME_SCALE = [[0.0, "#12355e"], [0.35, "#2f6fb5"], [0.7, "#86b3dd"], [1.0, "#dbe8f5"]]
"""Early is dark, late is pale: one hue, ordered by lightness."""
