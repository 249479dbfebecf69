"""Numbers as people read them."""

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_bytes(count: int) -> str:
    """Write a size for people: "12 B", "3.4 KiB", "216 MiB"."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS))
    value = count / 1024**power
    if value >= 1023.5 and power < len(_UNITS):
        power, value = power + 1, value / 1024
    return (
        f"{value:.1f} {_UNITS[power - 1]}" if value < 99.95 else f"{value:.0f} {_UNITS[power - 1]}"
    )


def plural(count: int, thing: str, things: str | None = None) -> str:
    """Write "1 file", "2 files"."""
    return f"{count} {thing if count == 1 else things or thing + 's'}"
