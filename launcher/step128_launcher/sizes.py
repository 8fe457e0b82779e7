"""Byte counts as people read them."""


def format_bytes(count: int) -> str:
    """Return for example "1.25 GiB", "38.4 MiB" or "512 B"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= factor:
            return f"{count / factor:.{2 if unit == 'GiB' else 1}f} {unit}"
    return f"{count} B"
