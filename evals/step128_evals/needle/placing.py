"""Choose which function of a haystack stands for which depth."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from step128_evals.needle.haystack import Placed


def depths_of_items(depths: Sequence[int], items: int) -> list[int]:
    """Spread items over depths (percent) evenly; fewer items than depths still reach the first and the last."""
    if items >= len(depths):
        return [depths[number * len(depths) // items] for number in range(items)]
    if items == 1:
        return [depths[0]]
    return [depths[round(number * (len(depths) - 1) / (items - 1))] for number in range(items)]


def items_of_lengths(lengths: Sequence[int], items: int) -> list[int]:
    """Spread items over lengths; what does not divide goes to the longest."""
    share, rest = divmod(items, len(lengths))
    return [share + (number >= len(lengths) - rest) for number in range(len(lengths))]


def place(
    wanted: Sequence[int], placed: Sequence[Placed], used: Collection[tuple[str, str]], tolerance: float
) -> tuple[list[tuple[int, Placed]], list[int]]:
    """Give each wanted depth (percent) the nearest function, each function once, the best fits first.

    Args:
        wanted: depths, in percent; some may be equal.
        placed: what the haystack has.
        used: (file, name) of functions that other items ask about.
        tolerance: how many percent of depth a function may be off.

    Returns:
        (depth, function) pairs, and the depths for which there was none.
    """
    fits = sorted(
        (abs(100 * candidate.depth - depth), number, index)
        for number, depth in enumerate(wanted)
        for index, candidate in enumerate(placed)
        if (candidate.function.file, candidate.function.name) not in used
    )
    taken: dict[int, int] = {}
    for distance, number, index in fits:
        if distance <= tolerance and number not in taken and index not in taken.values():
            taken[number] = index
    pairs = [(wanted[number], placed[taken[number]]) for number in sorted(taken)]
    return pairs, [depth for number, depth in enumerate(wanted) if number not in taken]
