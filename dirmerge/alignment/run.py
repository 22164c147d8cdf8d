"""`dirmerge.align`: a recipe with a section `align` becomes one merged backbone and a head per task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dirmerge.alignment.heads import FOLDER, write_head
from dirmerge.alignment.job import Job
from dirmerge.alignment.result import AlignProgress, AlignResult, plain_fit
from dirmerge.alignment.sources import import_transformers
from dirmerge.checkpoints.output import MANIFEST, OutputFolder
from dirmerge.engine.card import CARD
from dirmerge.engine.compute import Compute
from dirmerge.engine.lanes import on_device
from dirmerge.engine.result import compute_text
from dirmerge.errors import RecipeError
from dirmerge.recipe import Recipe, load_recipe


def align(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    state: str | Path | None = None,
    progress: Callable[[AlignProgress], None] | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    memory: int | str | None = None,
) -> AlignResult:
    """Merges fine-tuned transformers and aligns every task's features: one backbone, a head per task.

    The recipe's section `align` says how, and where each task's unlabelled texts or images are. Base and
    merged weights are read from disk into the module that runs, one tensor at a time. The learned forms write
    a merged model in float32 beside the output while they run.

    Args:
        recipe: a YAML file, YAML text of several lines, or the same as a dict.
        out: the folder to write; it is written atomically.
        overwrite: whether an existing folder may be replaced; only one that dirmerge wrote and that holds no
            input, no recipe and not the working directory is.
        state: resume from this state file (`….safetensors`), which the learning writes.
        progress: called with an AlignProgress.
        device: as of `dirmerge.merge`; the models run on the first device, one model at a time. The learned
            forms also keep the base, the updates, the merged weights and their gradients there.
        threads: of the CPU; torch's number by default.
        memory: as of `dirmerge.merge`, for the merge; the models that are aligned are not counted.

    Returns:
        AlignResult; its fits always hold the control: the same map on the base model.

    Raises:
        RecipeError: an invalid recipe, one without `align`, or data without the given column.
        MissingPackageError: transformers or datasets is not installed (the extra `align`).
        CheckpointError: a model, head or data file that cannot be read.
        MismatchError: models that do not fit together, or whose features need weights the merge lacks.
        OutputError: the folder exists or cannot be written.

    Example:
        >>> result = dirmerge.align("recipe.yml", "merged")
        >>> head = dirmerge.alignment.read_heads("merged")["movies"].head
    """
    began = time.perf_counter()
    compute = Compute.resolve(device, threads, memory)
    loaded = load_recipe(recipe)
    if loaded.align is None:
        raise RecipeError(f"{loaded.origin}: align: is missing; it lists every task's unlabelled inputs")
    import_transformers()
    protected = [*loaded.files, *([Path(state)] if state is not None else [])]
    with (
        OutputFolder(Path(out), overwrite, protected) as folder,
        compute.scoped_threads(),
        on_device(compute.device),
    ):
        job = Job(loaded, loaded.align, compute, progress)
        inner = folder.path / "merged"
        result = job.run(inner, state)
        for entry in sorted(inner.iterdir()):
            entry.rename(folder.path / entry.name)
        inner.rmdir()
        result.path, result.merge.path = Path(out), Path(out)
        result.seconds = time.perf_counter() - began
        fits = {fit.name: plain_fit(fit) for fit in result.fits or []}
        for source in job.sources:
            info = {"method": result.method, "features": source.reads, **fits.get(source.name, {})}
            write_head(folder.path / FOLDER, source.name, result.heads[source.name], info)
        _document(folder.path, result)
        folder.commit()
    return result


def _document(folder: Path, result: AlignResult) -> None:
    """Adds the alignment to the manifest and to the model card."""
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8")) | {"align": result.to_dict()}
    manifest.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["", "## Heads", ""]
    lines.append(
        f"Every task has a head in `{FOLDER}/` with a map of the features folded in ({result.method}). "
        f"The models ran on {compute_text(result.compute)}."
    )
    if result.fits is not None:
        lines += ["", "| task | agreement with its fine-tune, merged | aligned | base aligned (control) |"]
        lines.append("|---|---|---|---|")
        for fit in result.fits:
            cells = [f"{100 * f.agreement:.1f} %" for f in (fit.plain, fit.aligned, fit.control) if f]
            lines.append(f"| {fit.name} | {' | '.join(cells)} |")
    with (folder / CARD).open("a", encoding="utf-8") as card:
        card.write("\n".join(lines) + "\n")
