"""Holding images back from training, to tune or to measure with."""

import numpy as np

__all__ = ["held_out"]


def held_out(labels: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Returns a mask (N,) of one image in `parts` of each class, at least one, always the same ones.

    Args:
        labels: integers from 0 on, (N,).
        parts: a tenth of each class is held out for 10.
        seed: which images these are.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == label)
        held[generator.choice(members, max(1, len(members) // parts), replace=False)] = True
    return held
