"""What the real-task benchmark measures, as data: task sets, the tables' methods, and the studies."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from benchmarks.tasks import debian
from dirmerge.demo.data import TASKS
from dirmerge.demo.run import METHODS


@dataclass(frozen=True)
class Post:
    """What a study does with a merged update.

    Attributes:
        centre: MDA's projection onto the simplex ETF of the shared frame.
        left: exponent by which the left side is whitened further.
        right: the same of the right side.
        ridge: ε of both.
    """

    centre: bool = False
    left: float = 0.0
    right: float = 0.0
    ridge: float = 0.0


@dataclass(frozen=True)
class Variant:
    """One row of a table: a method with its options; those left out are its defaults.

    Attributes:
        method: the method's name.
        options: of the method.
        truncated: start from the leading triplets, which are computed once for all rows of a study.
        post: what is done with the update.
    """

    method: str
    options: dict[str, object] = field(default_factory=dict)
    truncated: bool = False
    post: Post | None = None


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are merged, tasks that are only evaluated, and how many texts of each are read.

    Attributes:
        merged: their fine-tunes are merged, λ is chosen on their validation texts.
        unseen: evaluated beside them; their own fine-tunes are measured, never merged.
        validation_texts: per task.
        test_texts: per task.
    """

    merged: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    validation_texts: int = 120
    test_texts: int = 600

    @property
    def tasks(self) -> tuple[str, ...]:
        """All of them."""
        return self.merged + self.unseen


PYPI = tuple(TASKS)
DEBIAN = tuple(debian.TASKS)
# With more tasks fewer texts of each: the number of texts, and thereby the time and the error, stays.
SETS = {
    "pypi": TaskSet(PYPI),
    "unseen-a": TaskSet(tuple(t for t in PYPI if t not in ("icd10", "amazon")), ("icd10", "amazon")),
    "unseen-b": TaskSet(tuple(t for t in PYPI if t not in ("movie", "hscode")), ("movie", "hscode")),
    "four": TaskSet(("movie", "icd10", "city", "code")),
    "twelve": TaskSet(PYPI + DEBIAN[:4], (), 80, 400),
    "sixteen": TaskSet(PYPI + DEBIAN, (), 60, 300),
}

# The ways of fine-tuning, by name; adapters of other ranks are those of rank 16 in everything else.
KINDS = {
    "full": "full fine-tunes",
    "lora": "LoRA adapters, rank 16",
    "lora-r4": "LoRA adapters, rank 4",
    "lora-r64": "LoRA adapters, rank 64",
}


def family(kind: str) -> str:
    """Whether these are full fine-tunes or adapters: `full` or `lora`."""
    return kind.partition("-")[0]


# The tables' rows. Options left out are the method's defaults, which follow the kind (smoothing, rank).
_METHODS = {name: Variant(name) for name in METHODS if name != "wudi"}
# WUDI by Adam makes adapters dense and takes a hundred times longer than its exact minimiser.
TABLES = {
    "full": _METHODS | {"wudi": Variant("wudi")},
    "lora": _METHODS | {"wudi (exact)": Variant("wudi", {"solver": "exact"})},
}


def _frames(kind: str) -> dict[str, Variant]:
    return {f"mda {frame}": Variant("mda", {"frame": frame}) for frame in ("blocks", "canonical", "random")}


def _fraction(kind: str) -> dict[str, Variant]:
    """MDA's rank as a fraction of m; 1/T is the tables' row, 0.5 is capped at m/T by the frame."""
    return {f"mda fraction {x:g}": Variant("mda", {"fraction": x}) for x in (0.01, 0.1, 0.5)}


# DC-Merge's balancing by default, which `whitened` has too, and the other one.
SMOOTHING = {"full": "none", "lora": "average"}
OTHER = {"full": "average", "lora": "none"}


def _dc_merge(kind: str, **options: object) -> Variant:
    return Variant("dc_merge", {"smoothing": SMOOTHING[family(kind)], **options}, truncated=True)


def _keep(kind: str) -> dict[str, Variant]:
    """DC-Merge's filter: entries per task as a multiple of the rank, all of them, and no block mask."""
    rows = {f"dc_merge keep {k}r": _dc_merge(kind, keep_per_rank=k) for k in (1, 3, 10, 30)}
    rows["dc_merge keep all"] = _dc_merge(kind, keep=1.0)
    rows["dc_merge no block mask"] = _dc_merge(kind, block_mask=False)
    return rows


def _balancing(kind: str) -> dict[str, Variant]:
    """DC-Merge's energy balancing; the kind's default is the tables' row."""
    other = OTHER[family(kind)]
    rows = {f"dc_merge {other}": _dc_merge(kind, smoothing=other)}
    for rho in (2.0, 5.0, 10.0):
        rows[f"dc_merge linear {rho:g}"] = _dc_merge(kind, smoothing="linear", rho=rho)
    return rows


def _white(
    kind: str, a: float, b: float, ridge: float, smoothing: str = "none", post: Post | None = None
) -> Variant:
    options = {"left_exponent": a, "right_exponent": b, "ridge": ridge, "smoothing": smoothing}
    if family(kind) == "full":
        options["rank"] = 384  # all that the truncation left, which must not count as adapters
    return Variant("whitened", options, truncated=True, post=post)


# Exponents and ridges that are compared; (1, 1, 0) without balancing is TSV-M.
GRID = (
    (1.0, 1.0, 0.03),
    (1.5, 1.5, 0.03),
    (2.0, 1.5, 0.0),
    (2.0, 1.5, 0.03),
    (2.0, 1.5, 0.1),
    (2.0, 2.0, 0.03),
)


def _grid(kind: str, smoothing: str) -> dict[str, Variant]:
    suffix = "" if smoothing == "none" else f" {smoothing}"
    return {f"whitened {a:g} {b:g} {e:g}{suffix}": _white(kind, a, b, e, smoothing) for a, b, e in GRID}


def _whitened(kind: str) -> dict[str, Variant]:
    """Exponents and ridges, with the kind's balancing."""
    return _grid(kind, SMOOTHING[family(kind)])


def _rank(kind: str) -> dict[str, Variant]:
    """Directions kept per task: fewer than an adapter has, or than ⌊p/T⌋."""
    return {
        f"{method} rank {k}": Variant(method, {"rank": k})
        for method in ("tsv_m", "dc_merge", "whitened")
        for k in (12, 16, 24, 48, 64)
    }


def _combined(kind: str) -> dict[str, Variant]:
    """The whitened rule with what the published methods have: balancing, centring, DC-Merge's aggregation."""
    further = Post(left=1.0, right=0.5, ridge=0.03)
    rows = _grid(kind, OTHER[family(kind)])
    rows["whitened 2 1.5 0.03 linear"] = _white(kind, 2.0, 1.5, 0.03, smoothing="linear")
    rows["whitened centred"] = _white(kind, 2.0, 1.5, 0.03, post=Post(centre=True))
    rows["dc_merge whitened"] = dataclasses.replace(_dc_merge(kind), post=further)
    rows["iso_c whitened"] = Variant("iso_c", post=further)
    return rows


def _chosen(kind: str) -> dict[str, Variant]:
    """What the validation texts put first over both kinds, with the test texts."""
    return {"whitened iso_c": _combined(kind)["iso_c whitened"]}


STUDIES = {
    "frames": _frames,
    "fraction": _fraction,
    "keep": _keep,
    "balancing": _balancing,
    "rank": _rank,
    "whitened": _whitened,
    "combined": _combined,
    "chosen": _chosen,
}
# Studies whose settings are compared on validation texts alone, so that none is chosen on the test texts.
VALIDATION_ONLY = ("rank", "whitened", "combined")


def rows_of(study: str | None, kind: str) -> dict[str, Variant]:
    """The rows of a study, or of the tables where it is None."""
    return TABLES[family(kind)] if study is None else STUDIES[study](kind)


# Scales are scanned as alignment targets a(λD): raw λ of equal quality differ tenfold between methods.
TARGETS = {
    "lora": (0.06, 0.09, 0.13, 0.18, 0.24, 0.3, 0.36, 0.42, 0.5, 0.6, 0.75, 0.9, 1.05, 1.2),
    "full": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75),
}
START = {"lora": 0.5, "full": 0.9}

# What `make tasks` runs, in this order: the arguments of benchmarks.tasks (merge) and of
# benchmarks.tasks.alignment (align). Some hours on two cores.
SPECTRAL = ("task_arithmetic", "tsv_m", "iso_c", "iso_cts", "dc_merge", "whitened")
ALIGNED = "--methods task_arithmetic tsv_m dc_merge whitened"
PLAN = (
    "merge --seeds 0 1 2",
    f"align --seeds 0 1 2 {ALIGNED}",
    "merge --sets unseen-a unseen-b four twelve sixteen",
    "merge --study frames --seeds 0 1 2",
    "align --learn mda --seeds 0 1 2",
    "align --learn mda --start rotation --methods task_arithmetic dc_merge",
    *(
        f"align --learn mda --kinds full --methods task_arithmetic dc_merge --options {option}"
        for option in ("alpha=0", "beta=0", "rotate=false", "lr_scale=0.001")
    ),
    "align --learn adamerging --per model",
    "align --learn adamerging --per parameter --seeds 0 1 2",
    "merge --study keep --sets pypi four",
    "merge --study keep --kinds full --seeds 1 2",
    "merge --study balancing",
    "merge --study fraction",
    "merge --study whitened --seeds 0 1 2",
    "merge --study whitened --sets twelve sixteen",
    "merge --study combined --seeds 0 1 2",
    f"merge --kinds lora-r4 lora-r64 --methods {' '.join(SPECTRAL)}",
    "merge --kinds lora-r4 lora-r64 --study whitened",
    "merge --kinds lora-r4 --study keep",
    "merge --kinds lora-r64 --study rank",
    "merge --sets sixteen --kinds lora --study rank",
    "merge --kinds full --study rank",
    "merge --study chosen --seeds 0 1 2",
)
