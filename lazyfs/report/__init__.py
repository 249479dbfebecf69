"""What a recording says of a restore: where the seconds went, in words and in pictures.

`analysis.py` and what it is made of know nothing of drawing; `figures.py` draws, and with
`page.py` alone imports plotly, which is an extra (`lazyfs[report]`).
"""
