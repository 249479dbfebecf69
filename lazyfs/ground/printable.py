"""Names in a checkpoint are anybody's: none reaches a terminal, or a log, raw."""


def printable(text: str) -> str:
    r"""Return text that moves no cursor and starts no line: `\x1b` for an escape, `\xff` for bytes.

    What may be printed is as Unicode has it (`str.isprintable`); bytes of a name that are not
    UTF-8 arrive as surrogates (PEP 383) and leave as the bytes that they are.
    """
    if text.isprintable():
        return text
    return "".join(item if item.isprintable() else _escaped(item) for item in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
