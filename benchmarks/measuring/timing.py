"""Run times of several forms of the same work, taken in turns."""

import random
import time
from collections.abc import Callable, Sequence

__all__ = ["MIN_ROUNDS", "interleaved"]

MIN_ROUNDS = 5


def interleaved(
    forms: Sequence[Callable[[], object]], seconds: float, min_rounds: int = MIN_ROUNDS
) -> list[list[float]]:
    """Returns the run times of each form in seconds, taken in turns and in changing order.

    Drift of the machine's speed hits all forms alike, and each finds the caches as another leaves them.

    Args:
        forms: what to time.
        seconds: time to spend per form.
        min_rounds: runs of each form that are made even where they take longer.
    """
    start = time.perf_counter()
    for _ in range(2):
        start = time.perf_counter()
        for form in forms:
            form()
    rounds = max(min_rounds, int(seconds * len(forms) / (time.perf_counter() - start)))
    times: list[list[float]] = [[] for _ in forms]
    order = list(range(len(forms)))
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            start = time.perf_counter()
            forms[i]()
            times[i].append(time.perf_counter() - start)
    return times
