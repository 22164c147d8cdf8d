"""The accuracy of a merged update over a grid of scales."""

from __future__ import annotations

from benchmarks.tasks.experiments import START, TARGETS, family
from benchmarks.tasks.setting import Setting
from benchmarks.tasks.updates import Merge, evaluate, mean, set_weights


def scan(setting: Setting, update: Merge) -> list[dict[str, float]]:
    """Normalised validation accuracy over alignment targets, outwards from the usual one.

    Each direction ends after two targets in a row that are below the best one so far.

    Args:
        setting: the model, whose weights are overwritten, the texts, and each task's own accuracy.
        update: the merge.

    Returns:
        Rows of alignment (the target), scale (λ) and normalised accuracy, in the order of the targets.
    """
    rows: dict[float, dict[str, float]] = {}
    own = setting.own_accuracy("validation")

    def measure(target: float) -> float:
        scale = target / update.alignment
        set_weights(setting.model, setting.base, update, scale)
        hits = evaluate(setting.model, setting.validation, bf16=setting.bf16)
        normalised = sum(mean(bits) / own[name] for name, bits in hits.items()) / len(hits)
        rows[target] = {"alignment": target, "scale": scale, "normalised": normalised}
        return normalised

    grid = TARGETS[family(setting.kind)]
    start = grid.index(START[family(setting.kind)])
    best = measure(grid[start])
    for side in (grid[start + 1 :], grid[:start][::-1]):
        below = 0
        for target in side:
            value = measure(target)
            below = 0 if value >= best else below + 1
            best = max(best, value)
            if below == 2:
                break
    return [rows[target] for target in sorted(rows)]
