"""What a merge reports: progress while it runs, and the result with a record of every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """One step of a merge.

    Attributes:
        phase: merge (first pass, which finds λ) or write.
        name: the tensor that has just been done.
        done: tensors done in all phases.
        total: tensors to do in all phases.
        written_bytes: bytes of the output so far.
        output_bytes: bytes of the whole output.
        work: fraction of the estimated work that is done, in [0, 1].
    """

    phase: str
    name: str
    done: int
    total: int
    written_bytes: int
    output_bytes: int
    work: float


ProgressCallback = Callable[[Progress], None]


@dataclass
class TensorRecord:
    """What happened to one tensor of the output.

    Attributes:
        name: in the output.
        rule: of the plan.
        why: where the rule comes from.
        rank: of the merged update, None for a dense one.
        energy: per task the energy of the kept directions (the smallest over the matrices of a stack).
        kept_energy: what an adapter's truncation to a chosen rank kept.
        scale: λ, None where none applies.
        alignment: a(D) of this tensor before scaling, where it was computed.
        fallbacks: roads the method took other than the one asked for.
        notes: facts worth knowing.
        seconds: time spent on it.
    """

    name: str
    rule: str
    why: str
    rank: int | None = None
    energy: list[float] = field(default_factory=list)
    kept_energy: float | None = None
    scale: float | None = None
    alignment: float | None = None
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain data (JSON), without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, [])}


@dataclass
class MergeResult:
    """A finished merge.

    Attributes:
        method: name of the method.
        path: the folder written, None for a merge in memory.
        state_dict: the merged tensors, None for a merge to a folder.
        scale: λ, None where it differs between tensors.
        scale_origin: where λ comes from.
        alignment: a(λD) of the whole model, None where it was not computed.
        records: one per tensor, in the order of the output.
        notes: facts about the whole merge.
        hashes: BLAKE3 of every input weight file, by path.
        compute: devices, why these, threads and memory (Compute.to_dict()).
        read_bytes: bytes read of the input files.
        seconds: wall time.
        peak_rss: largest resident memory of the process so far, in bytes.
    """

    method: str
    path: Path | None
    state_dict: dict[str, Tensor] | None
    scale: float | None
    scale_origin: str
    alignment: float | None
    records: list[TensorRecord]
    notes: list[str]
    hashes: dict[str, str]
    compute: dict[str, Any]
    read_bytes: int
    seconds: float
    peak_rss: int

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """Tensors whose method took another road than the one asked for."""
        return {record.name: record.fallbacks for record in self.records if record.fallbacks}

    def frequent_notes(self, most: int = 5) -> list[str]:
        """Returns what was noted of the most tensors, with their number."""
        counts = Counter(note for record in self.records for note in record.notes)
        return [f"{note} ({count} tensors)" for note, count in counts.most_common(most)]

    @property
    def rules(self) -> dict[str, int]:
        """Number of tensors by rule."""
        return dict(Counter(record.rule for record in self.records))

    def scale_text(self) -> str:
        """Returns λ and its origin in one phrase."""
        if self.scale is not None:
            text = f"λ = {self.scale:.4g}"
        else:
            scales = [record.scale for record in self.records if record.scale is not None]
            if not scales:
                return "no λ applies"
            text = f"λ from {min(scales):.4g} to {max(scales):.4g}"
        if self.alignment is not None:
            text += f", alignment {self.alignment:.3g}"
        return f"{text} ({self.scale_origin})"

    def lowest_energy(self) -> tuple[str, float] | None:
        """Returns the tensor and value of the smallest energy kept, None when nothing was truncated."""
        kept = [(record.name, min(record.energy)) for record in self.records if record.energy]
        kept = [(name, energy) for name, energy in kept if math.isfinite(energy)]
        return min(kept, key=lambda item: item[1]) if kept else None

    def summary(self) -> str:
        """Returns the summary as lines of text."""
        rules = ", ".join(f"{count} {rule}" for rule, count in sorted(self.rules.items()))
        lines = [
            f"method     {self.method}",
            f"scale      {self.scale_text()}",
            f"tensors    {rules}",
            f"ran on     {compute_text(self.compute)}",
            f"time       {self.seconds:.1f} s",
            f"peak RSS   {self.peak_rss / 1e9:.2f} GB",
            f"fallbacks  {len(self.fallbacks)}",
        ]
        lines += [f"note       {note}" for note in self.frequent_notes()]
        if self.path is not None:
            lines.append(f"output     {self.path}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the tensors as plain data (JSON)."""
        return {
            "method": self.method,
            "path": None if self.path is None else str(self.path),
            "scale": self.scale,
            "scale_origin": self.scale_origin,
            "scale_text": self.scale_text(),
            "alignment": self.alignment,
            "rules": self.rules,
            "fallbacks": self.fallbacks,
            "notes": self.notes,
            "hashes": self.hashes,
            "compute": self.compute,
            "read_bytes": self.read_bytes,
            "seconds": round(self.seconds, 3),
            "peak_rss": self.peak_rss,
            "tensors": [record.to_dict() for record in self.records],
        }


def compute_text(compute: Mapping[str, Any]) -> str:
    """Returns one phrase for Compute.to_dict(): devices, why these, threads, memory."""
    text = f"{', '.join(compute['devices'])} ({compute['reason']}), {compute['threads']} threads"
    if compute["memory"] is not None:
        text += f", at most {compute['memory'] / 1e9:.2f} GB"
    return text
