"""The widths that prompts are padded to: few, since each is compiled, and none much wider than what it holds."""

from collections.abc import Collection, Sequence

import numpy as np

# Compiling one more width takes about as long as computing this many tokens of padding: measured with T5-small on two
# CPU cores. An accelerator computes more in that time, so it gets more widths than are best, but never many.
COMPILE_COST = 1024
SMALLEST = 16


def round_up(length: int) -> int:
    """Return the smallest width that holds `length`: multiples of 16, from 128 on four to each doubling."""
    step = max(SMALLEST, (1 << max(length - 1, 0).bit_length()) // 8)
    return max(SMALLEST, -(-length // step) * step)


def pad(prompts: Sequence[Sequence[int]], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and segments [rows, width]: segment 1, and 0 for padding and for rows without a prompt."""
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        segments[row, : len(prompt)] = 1
    return tokens, segments


def choose(lengths: Sequence[int], rows: int, compiled: Collection[int] = ()) -> list[int]:
    """Return a width for each batch of `rows` prompts; `lengths`, ascending, are those of each batch's longest prompt.

    The widths minimize the cost of padding and compiling together; widths in `compiled` cost no compiling.
    """
    if not lengths:
        return []
    places = sorted({round_up(length) for length in lengths} | {w for w in compiled if w >= lengths[0]})
    # best[j]: (the cost of all batches up to place j, where a width ends; the place of the width before).
    best: list[tuple[float, int]] = [(0.0, -1)]
    held = [0, *(sum(length <= place for length in lengths) for place in places)]  # batches up to each place
    for j, place in enumerate(places, 1):
        new = 0 if place in compiled else COMPILE_COST
        cost = [best[i][0] + (held[j] - held[i]) * rows * place + new * (held[j] > held[i]) for i in range(j)]
        before = min(range(j), key=cost.__getitem__)
        best.append((cost[before], before))
    widths: list[int] = []
    j = next(j for j in range(len(places) + 1) if held[j] == len(lengths))
    j = min((k for k in range(j, len(places) + 1)), key=lambda k: best[k][0])
    while j > 0:
        before = best[j][1]
        widths = [places[j - 1]] * (held[j] - held[before]) + widths
        j = before
    return widths
