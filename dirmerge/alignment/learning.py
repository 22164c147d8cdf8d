"""The learned form of MDA in feature space: λ by Adam, rotations on SO(d), no labels; and AdaMerging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dirmerge.alignment.learned import Learned, LearnProgress
from dirmerge.alignment.learner import Learner
from dirmerge.alignment.model import AlignmentTask, Model
from dirmerge.alignment.weights import ScaledUpdates
from dirmerge.methods.tasks import Delta
from dirmerge.recipe.align import LearnOptions


def learn(
    model: Model | torch.nn.Module,
    updates: Mapping[str, Delta | Sequence[Delta]],
    tasks: Sequence[AlignmentTask],
    options: LearnOptions | None = None,
    *,
    scale: float | Mapping[str, float] = 1.0,
    maps: Sequence[Tensor] | None = None,
    own: Iterable[Model | torch.nn.Module] | None = None,
    state: str | Path | None = None,
    progress: Callable[[LearnProgress], None] | None = None,
) -> Learned:
    """Learns λ of every update and a rotation per task by L = Σ_t L_ent + α L_align + β L_rot, unlabelled.

    λ by Adam; R_t by Adam's direction in the Lie algebra, retracted to SO(d) by rotation_step. A guard
    watches the predictions, and a run that drifts stops with its best state.

    Args:
        model: the base model, with the fixed updates (means of vectors) already in it; in evaluation mode.
        updates: D by parameter name, LowRank ones stay factored; or per name several, one λ each. They are
            copied to the model's device.
        tasks: unlabelled batches, heads, feature readers.
        options: default LearnOptions().
        scale: λ at the start, one for all or by name.
        maps: per task a (d, d) map at the start, from closed_form for instance; default the identity. R_t
            acts after it.
        own: per task its fine-tune, run once on the watched batches, one at a time, so a generator keeps one
            in memory. The guard then sees whether predictions leave those of the fine-tunes, and the best
            state is the one that agrees with them most. Without it a falling loss is all there is, which is
            no promise of accuracy: on the real tasks it fell while TSV-M and DC-Merge lost 0.6 to 1.6 points
            (benchmarks/results/tasks.md).
        state: a file `….safetensors` (with a JSON beside it), to which every check writes the state. If it
            exists, the run resumes from it, with the same result bit for bit.
        progress: called after every step.

    Returns:
        Learned: model, λ, maps, folded heads, and what the guard saw. Never worse than the start on the
        watched batches, by agreement with the fine-tunes, without them by the unsupervised loss.

    Raises:
        ValueError: no task, names given twice, updates, maps or fine-tunes that do not fit, or targets that
            do not exist.
        CheckpointError: a state that cannot be read, or one of another run.
        OutputError: the state cannot be written.

    Source:
        MDA (arXiv 2512.00391), feature space; AdaMerging (arXiv 2310.02575) without rotations, α = β = 0.
    """
    chosen = options or LearnOptions()
    base = model if isinstance(model, Model) else Model(model)
    run = Learner(base, ScaledUpdates(base, updates, scale, chosen.per), tasks, chosen, maps, own)
    path = None if state is None else Path(state).expanduser()
    if path is not None and path.exists():
        run.restore(path)
    else:
        run.begin()
    return run.go(path, progress)


def adamerging(
    model: Model | torch.nn.Module,
    deltas: Mapping[str, Sequence[Delta]],
    tasks: Sequence[AlignmentTask],
    options: LearnOptions | None = None,
    *,
    scale: float = 0.3,
    own: Iterable[Model | torch.nn.Module] | None = None,
    state: str | Path | None = None,
    progress: Callable[[LearnProgress], None] | None = None,
) -> Learned:
    """Learns λ_t^(l) of W_0 + Σ_t λ_t^(l) D_t^(l) by entropy alone: AdaMerging.

    Layer-wise with `per="parameter"` or `"block"`, task-wise with `per="model"`; the deltas of all tasks are
    in memory, adapters as factors.

    Args:
        model: the base model.
        deltas: by parameter name D_1 … D_T.
        tasks: see learn.
        options: default LearnOptions(); its rotations and its weights α, β are switched off.
        scale: λ at the start; 0.3 in the paper.
        own: see learn.
        state: see learn.
        progress: see learn.

    Source:
        AdaMerging (arXiv 2310.02575).
    """
    plain = (options or LearnOptions()).model_copy(update={"rotate": False, "alpha": 0.0, "beta": 0.0})
    return learn(model, deltas, tasks, plain, scale=scale, own=own, state=state, progress=progress)
