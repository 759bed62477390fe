"""Which tokens share a row, so that none is cut that fits (Ding et al. 2024, fewer truncations)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def split_document(
    start: int, stop: int, row: int, answers: Int[np.ndarray, "runs 2"] | None = None
) -> list[tuple[int, int]]:
    """A document in pieces of at most a row: a text so that each token but the first is predicted
    once, a conversation behind its answers. Of an answer that a row cannot hold the rest is left
    out, and of a question that would fill the row all but its end, which may take half of it."""
    pieces = []
    while stop - start > row:
        end = start + row
        if answers is None:
            pieces.append((start, end))
            start = end - 1
            continue
        starts, stops = answers[np.searchsorted(answers[:, 1], start, "right") :].T
        if len(starts) and starts[0] >= end:
            start = int(starts[0]) - row // 2
            continue
        whole = np.searchsorted(stops, end, "right")
        if len(starts):
            pieces.append((start, int(stops[whole - 1]) if whole else end))
        start = int(stops[max(whole - 1, 0)]) if len(stops) else stop
    return [*pieces, (start, stop)] if start < stop else pieces


def best_fit(lengths: Sequence[int], row: int) -> list[list[int]]:
    """The numbers of the pieces in each row: the longest first, each where it leaves least."""
    rows, by_room, rooms = [], defaultdict(list), 0  # bit n of `rooms`: some row has n tokens left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if fits := rooms >> lengths[i]:
            room = lengths[i] + (fits & -fits).bit_length() - 1
            place = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            room, place = row, len(rows)
            rows.append([])
        rows[place].append(i)
        if left := room - lengths[i]:
            by_room[left].append(place)
            rooms |= 1 << left
    return rows
