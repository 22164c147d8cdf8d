"""Coefficients of the polar iterations: minimax polynomials found by the Remez algorithm in float64.

    python -m dirmerge.linalg.minimax 1e-3        prints the steps for singular values from 1e-3 to 1

Source: Amsel, Persson, Musco, Gower, The Polar Express, arXiv 2505.16932: the best composition of odd
quintics is greedy, each step minimax on the interval that the step before leaves.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import lru_cache

import torch

LOWER = 1e-3
"""Smallest singular value, relative to the largest, that the polynomial steps are made for."""

LOCAL = (15 / 8, -10 / 8, 3 / 8)
"""The quintic Newton–Schulz step, of third order near 1."""


@lru_cache(maxsize=64)
def quintic(lower: float) -> tuple[float, float, float, float]:
    """Finds a, b, c, E such that a x + b x³ + c x⁵ has the least error E against 1 on [lower, 1].

    Args:
        lower: lower end of the interval, between 0 and 1.

    Returns:
        (a, b, c, E).
    """
    q, r = lower + (1 - lower) / 3, lower + 2 * (1 - lower) / 3
    a = b = c = error = 0.0
    for _ in range(100):
        points = torch.tensor([lower, q, r, 1.0], dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        system = torch.stack([points, points**3, points**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        # Interior extrema: roots of a + 3 b x² + 5 c x⁴.
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        new_q, new_r = sorted(
            math.sqrt(max((-3 * b + sign * root) / (10 * c), lower * lower)) for sign in (-1, 1)
        )
        moved = abs(new_q - q) + abs(new_r - r)
        q, r = new_q, new_r
        if moved < 1e-14:
            break
    return a, b, c, abs(error)


@lru_cache(maxsize=64)
def schedule(lower: float = LOWER) -> tuple[tuple[float, float, float], ...]:
    """Computes the steps that take singular values from [lower, 1] to within 0.3 of 1.

    Args:
        lower: of the singular values before the first step, between 0 and 1.

    Returns:
        (a, b, c) per step, of x ← a x + b x³ + c x⁵.
    """
    steps: list[tuple[float, float, float]] = []
    scale = 1.0
    while lower < 0.7:
        a, b, c, error = quintic(lower)
        steps.append((a * scale, b * scale**3, c * scale**5))
        # The step maps onto [1 − E, 1 + E]; the next one is written for [·, 1], so it takes the division by
        # 1 + E with it.
        scale = 1 / (1 + error)
        lower = (1 - error) / (1 + error)
    return tuple(steps)


def main() -> None:
    """Prints a schedule, one step a line."""
    parser = argparse.ArgumentParser(prog="python -m dirmerge.linalg.minimax")
    parser.add_argument("lower", type=float, nargs="?", default=LOWER)
    lower = parser.parse_args().lower
    if not 0 < lower < 1:
        parser.error(f"lower must lie between 0 and 1, got {lower}")
    for a, b, c in schedule(lower):
        sys.stdout.write(f"{a:.17g} {b:.17g} {c:.17g}\n")


if __name__ == "__main__":
    main()
