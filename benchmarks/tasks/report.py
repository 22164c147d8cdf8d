"""The page benchmarks/results/tasks.md and its plots, from the result files alone.

python -m benchmarks.tasks.report [FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from benchmarks.tasks import plots
from benchmarks.tasks.experiments import KINDS, STUDIES, TABLES, family
from benchmarks.tasks.groups import Floats, Group, load
from benchmarks.tasks.store import FOLDER, Row, read
from dirmerge.methods import get_method

REFERENCE = "dc_merge"  # paired differences are taken against it
GUARDED = ", guarded"  # a learned form's row with the state that the fine-tunes chose
# The row that each study's settings are compared with.
STUDY_OF = {
    "frames": "tsv_m",
    "fraction": "mda",
    "keep": "dc_merge",
    "balancing": "dc_merge",
    "chosen": "whitened",
}
METHODS = {name for rows in TABLES.values() for name in rows}


def write(folder: Path = FOLDER) -> None:
    """Writes the page beside the folder of the results, and the plots into it."""
    groups = load(folder)
    plots.write(groups, folder)
    page = _page(groups, folder).rstrip() + "\n"
    (folder.parent / f"{folder.name}.md").write_text(page, encoding="utf-8")


def _page(groups: dict[tuple[str, str], Group], folder: Path) -> str:
    """The template page.md.j2 filled with the tables; a section without results says so."""
    tables = {
        **{f"methods_{kind}": _methods_table(groups.get(("pypi", kind))) for kind in ("full", "lora")},
        "ranks": _ranks(groups),
        **{f"study_{study}": _study(groups, study) for study in STUDY_OF},
        "alignment": _alignment(groups),
        "options": _learned_options(groups),
        "number": _more_tasks(groups),
        "unseen": _unseen(groups),
        "widths": _widths(folder),
        "whitened": _validation_study(groups),
        "scale": _scales(groups),
    }
    source = (Path(__file__).with_name("page.md.j2")).read_text(encoding="utf-8")
    template = jinja2.Template(source, undefined=jinja2.StrictUndefined, trim_blocks=True)
    filled = {name: "\n".join(lines).strip() or "*Not measured yet.*" for name, lines in tables.items()}
    return template.render(folder=folder.name, **filled)


def _texts(group: Group) -> str:
    validation, test = group.texts
    seeds = ", ".join(map(str, group.runs))
    return f"Seeds {seeds}; at most {validation} validation and {test} test texts a task."


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [_line(heading), "|---" * len(heading) + "|", *(_line(row) for row in rows)]


def _sorted(group: Group, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (group.estimate(name).value, name))


def _by_task(group: Group, name: str) -> list[str]:
    seeds = group.seeds() if name in ("base", "own") else group.seeds(name)
    found = [float(np.mean([group.accuracy(name, t, s)[0] for s in seeds])) for t in group.merged]
    return [f"{100 * value:.1f}" for value in [*found, float(np.mean(found))]]


def _numbers(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def _methods_table(group: Group | None) -> list[str]:
    """Accuracy by task, normalised, against the reference; and the scales that were best."""
    if group is None:
        return []
    rows: list[list[object]] = [
        ["base model", *_by_task(group, "base"), group.estimate("base").cell(), "", ""]
    ]
    for name in _sorted(group, METHODS & {*group.names}):
        estimate = group.estimate(name)
        difference = [""] * 2
        if name != REFERENCE and group.seeds(name, REFERENCE):
            found = group.estimate(name, REFERENCE)
            difference = [found.cell(sign=True), found.seed_cell(sign=True)]
        rows.append([name, *_by_task(group, name), estimate.cell(), *difference])
    rows.append(["own fine-tunes", *_by_task(group, "own"), "100", "", ""])
    heading = ["method", *group.merged, "average", "normalised [95 %]", "against DC-Merge [95 %]", "by seed"]
    lines = _table(heading, rows)
    scales = []
    for name in _sorted(group, METHODS & {*group.names}):
        found_rows = group.rows(name)
        threads = {row["threads"] for row in found_rows}
        seconds = float(np.mean([row["merge_seconds"] for row in found_rows]))
        cells = (_numbers(row[key] for row in found_rows) for key in ("scale", "alignment"))
        scales.append([name, *cells, f"{seconds:.2f} ({max(threads)})"])
    heading = ["method", "best λ by seed", "a(λD)", "merge, s (threads)"]
    return [_texts(group), "", *lines, "", *_table(heading, scales)]


def _alignment(groups: dict[tuple[str, str], Group]) -> list[str]:
    """Feature maps and learned forms: one column per form, the control first."""
    lines = []
    for kind, title in KINDS.items():
        group = groups.get(("pypi", kind))
        if group is None or "base + ridge" not in group.names:
            continue
        forms = ["rotation", "ridge", "learned", f"learned{GUARDED}", "rotation + learned", "ridge + learned"]
        methods = [m for m in METHODS if any(f"{m} + {f}" in group.names for f in forms)]
        forms = [f for f in forms if any(f"{m} + {f}" in group.names for m in methods)]
        rows: list[list[object]] = []
        for method in ["base", *_sorted(group, methods)]:
            row: list[object] = [method if method != "base" else "base model, nothing merged (control)"]
            row.append(group.estimate(method).seed_cell())
            for form in forms:
                name = f"{method} + {form}"
                if name not in group.names:
                    row.append("")
                    continue
                gain = group.estimate(name, method)
                row.append(f"{group.estimate(name).seed_cell()} ({100 * gain.value:+.1f})")
            rows.append(row)
        others = [n for n in group.names if n.startswith("adamerging")]
        rows += [[n, group.estimate(n).seed_cell(), *[""] * len(forms)] for n in sorted(others)]
        lines += [f"{title[0].upper()}{title[1:]}:", "", *_table(["method", "plain", *forms], rows), ""]
    return lines


def _ranks(groups: dict[tuple[str, str], Group]) -> list[str]:
    """Normalised accuracy of seed 0 by the rank of the adapters."""
    found = {
        title: groups["pypi", kind]
        for kind, title in KINDS.items()
        if family(kind) == "lora" and ("pypi", kind) in groups
    }
    if len(found) < 2:
        return []
    named = {name for group in found.values() for name in METHODS & {*group.names}}
    names = [n for n in named if all(0 in group.seeds(n) for group in found.values())]
    rows = []
    for name in [
        "base",
        *sorted(names, key=lambda n: sum(g.estimate(n, seeds=[0]).value for g in found.values())),
    ]:
        cells = []
        for group in found.values():
            cell = group.estimate(name, seeds=[0]).cell()
            if name not in ("base", REFERENCE):
                cell += f" ({group.estimate(name, REFERENCE, seeds=[0]).cell(sign=True)})"
            cells.append(cell)
        rows.append([name, *cells])
    return _table(["method", *found], rows)


def _learned_options(groups: dict[tuple[str, str], Group]) -> list[str]:
    """The learned form with one option changed, against its start and against the defaults."""
    rows: list[list[object]] = []
    for (task_set, kind), group in groups.items():
        for name in sorted(n for n in group.names if " + learned" in n and not n.endswith(GUARDED)):
            start, _, option = name.partition(" + learned")
            full = f"{start} + learned"
            against = group.estimate(name, full).cell(sign=True) if option and group.seeds(name, full) else ""
            about = [f"{kind} {task_set}", start, option.strip() or "defaults"]
            agreement = min(min(r["agreement"]) for row in group.rows(name) for r in row["history"])
            gains = [
                group.estimate(n, start).cell(sign=True) if group.seeds(n, start) else ""
                for n in (name, name + GUARDED)
            ]
            kept = [
                f"{row['best_step']}" + (f" (stopped at {row['steps']})" if row["stopped"] else "")
                for row in group.rows(name + GUARDED)
            ]
            rows.append([*about, gains[0], against, f"{agreement:.2f}", gains[1], " / ".join(kept)])
    heading = ["setting", "start", "option", "against the start [95 %]", "against the defaults [95 %]"]
    heading += ["least agreement", "guarded, against the start [95 %]", "step kept"]
    return _table(heading, rows) if rows else []


def _more_tasks(groups: dict[tuple[str, str], Group]) -> list[str]:
    """Normalised accuracy of seed 0 by the number of tasks merged."""
    lines = []
    for kind, title in KINDS.items():
        found = {len(g.merged): g for (s, k), g in groups.items() if k == kind and not g.unseen}
        if len(found) < 2:
            continue
        largest = found[max(found)]
        rows = []
        for name in _sorted(largest, METHODS & {*largest.names}):
            cells = [
                found[t].estimate(name, seeds=[s for s in found[t].seeds(name) if s == 0]).cell()
                if 0 in found[t].seeds(name)
                else ""
                for t in sorted(found)
            ]
            rows.append([name, *cells])
        heading = ["method", *(f"T = {t}" for t in sorted(found))]
        base = ["base model", *(found[t].estimate("base", seeds=[0]).cell() for t in sorted(found))]
        lines += [f"{title[0].upper()}{title[1:]}:", "", *_table(heading, [base, *rows]), ""]
    return lines


def _unseen(groups: dict[tuple[str, str], Group]) -> list[str]:
    """Tasks that were not merged."""
    lines = []
    for (_, kind), group in groups.items():
        if not group.unseen:
            continue
        rows: list[list[object]] = []
        for name in ["base", *_sorted(group, METHODS & {*group.names}), "own"]:
            cells = [group.estimate(name, tasks=[t], normalised=False).seed_cell() for t in group.unseen]
            unseen = group.estimate(name, tasks=group.unseen, normalised=False)
            gain = (
                group.estimate(name, "base", tasks=group.unseen, normalised=False).cell(sign=True)
                if name != "base"
                else ""
            )
            seen = group.estimate(name).cell()
            rows.append([name, seen, *cells, f"{100 * unseen.value:.2f}", gain])
        heading = ["method", "six merged, normalised", *group.unseen, "unseen, accuracy", "against the base"]
        title = f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}, unseen: {' and '.join(group.unseen)}:"
        lines += [title, "", *_table(heading, rows), ""]
    return lines


def _study(groups: dict[tuple[str, str], Group], study: str) -> list[str]:
    """Settings of one method against its row with the defaults."""
    plain = STUDY_OF[study]
    lines = []
    for (task_set, kind), group in groups.items():
        names = [name for name in STUDIES[study](kind) if name in group.names]
        names += ["mda"] if names and study == "frames" else []
        if not names or plain not in group.names:
            continue
        rows: list[list[object]] = [[plain, group.estimate(plain).cell(), "", ""]]
        for name in _sorted(group, names):
            found = group.estimate(name, plain)
            cells = found.cell(sign=True), found.seed_cell(sign=True)
            rows.append([name, group.estimate(name).cell(), *cells])
        heading = ["setting", "normalised [95 %]", f"against {plain} [95 %]", "by seed"]
        title = f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}, {task_set} (T = {len(group.merged)}):"
        lines += [title, "", *_table(heading, rows), ""]
    return lines


def _best(row: Row) -> float:
    return max(point["normalised"] for point in row["curve"])


def _validation_study(groups: dict[tuple[str, str], Group]) -> list[str]:
    """Settings that are compared on validation texts alone: mean over the seeds, which all must have."""
    names: dict[str, None] = {}
    columns: dict[str, list[dict[str, Row]]] = {}
    for (_, kind), group in sorted(groups.items(), key=lambda item: (item[0][1], len(item[1].merged))):
        found = {
            seed: [n for n, row in run["rows"].items() if n != "own" and "test" not in row]
            for seed, run in group.runs.items()
        }
        runs = [group.runs[seed]["rows"] for seed in found if found[seed]]
        if runs:
            seeds = "seeds" if len(runs) > 1 else "seed"
            columns[f"{kind}, T = {len(group.merged)} ({len(runs)} {seeds})"] = runs
            names |= dict.fromkeys(name for rows in found.values() for name in rows)
    if not names:
        return []
    compared = [*names, *(n for n in ("tsv_m", "iso_c", "iso_cts", "dc_merge") if n not in names)]
    table = []
    for name in compared:
        values = [
            sum(_best(rows[name]) for rows in runs) / len(runs)
            if all(name in rows for rows in runs)
            else None
            for runs in columns.values()
        ]
        table.append([name, *("" if value is None else f"{100 * value:.2f}" for value in values)])
    table.sort(key=lambda row: row[0])
    return _table(["setting", *columns], table)


@dataclass(frozen=True)
class Rule:
    """A rule for λ: what is held constant. `of(run, row)` is that quantity at λ = 1."""

    name: str
    of: Any

    def regret(self, row: Row, unit: float, constant: float) -> float:
        """Validation accuracy lost against the row's best: over log λ, beyond the scan along its end."""
        curve = row["curve"]
        x = np.log([point["scale"] for point in curve])
        y = np.array([point["normalised"] for point in curve])
        at = float(np.log(constant / unit))
        value = float(np.interp(at, x, y))
        if at < x[0]:
            value -= max(0.0, float((y[1] - y[0]) / (x[1] - x[0]))) * float(x[0] - at)
        elif at > x[-1]:
            value -= max(0.0, float((y[-2] - y[-1]) / (x[-1] - x[-2]))) * float(at - x[-1])
        return float(y.max()) - value


def _norms(run: dict[str, Any]) -> Floats:
    return np.array(run["rows"]["own"]["norms"][: len(run["about"]["merged"])])


RULES = (
    Rule("λ", lambda run, row: 1.0),
    Rule("a(λD)", lambda run, row: _alignment_of(row)),
    Rule("a(λD) √T", lambda run, row: _alignment_of(row) * len(run["about"]["merged"]) ** 0.5),
    Rule("a(λD) T", lambda run, row: _alignment_of(row) * len(run["about"]["merged"])),
    Rule("‖λD‖ / √mean ‖D_t‖²", lambda run, row: _norm(row) / float(np.sqrt((_norms(run) ** 2).mean()))),
    Rule("‖λD‖ / √Σ ‖D_t‖²", lambda run, row: _norm(row) / float(np.sqrt((_norms(run) ** 2).sum()))),
    Rule("‖λD‖ / ‖W_0‖", lambda run, row: _norm(row) / run["rows"]["own"]["base_norm"]),
)
# They weigh the tasks' entries or directions by their energy, where the spectral methods weigh them alike.
SUMS = ("task_arithmetic", "ties", "wudi", "wudi (exact)")


def _alignment_of(row: Row) -> float:
    return float(row["alignment"] / row["scale"])


def _norm(row: Row) -> float:
    return float(row["norm"] / row["scale"])


def scale_cases(groups: dict[tuple[str, str], Group]) -> list[tuple[str, str, int, str, dict[str, Any], Row]]:
    """(set, kind, seed, method, run, row) of every scan of the tables' methods."""
    return [
        (task_set, kind, seed, name, run, run["rows"][name])
        for (task_set, kind), group in groups.items()
        for seed, run in group.runs.items()
        for name in run["rows"]
        if name in METHODS and run["rows"][name].get("curve") and "test" in run["rows"][name]
        if "norm" in run["rows"][name]
    ]


def best_constant(rule: Rule, cases: Sequence[tuple[dict[str, Any], Row]]) -> float:
    """The constant of a rule that loses least on average over these scans."""
    units = [rule.of(run, row) for run, row in cases]
    bounds = [
        (np.log(row["curve"][0]["scale"] * unit), np.log(row["curve"][-1]["scale"] * unit))
        for (_, row), unit in zip(cases, units, strict=True)
    ]
    grid = np.exp(np.linspace(min(b[0] for b in bounds), max(b[1] for b in bounds), 400))
    losses = [
        sum(rule.regret(row, unit, c) for (_, row), unit in zip(cases, units, strict=True)) for c in grid
    ]
    return float(grid[int(np.argmin(losses))])


def _scales(groups: dict[tuple[str, str], Group]) -> list[str]:
    """The regret of rules for λ, constants from seed 0 of eight tasks, applied everywhere."""
    cases = scale_cases(groups)
    if not any(case[0] == "pypi" and case[2] == 0 for case in cases):
        return []
    settings = sorted(
        {(kind, task_set) for task_set, kind, *_ in cases}, key=lambda s: (s[0], len(s[1]), s[1])
    )
    rows = []
    fitted = ("full", "lora")
    for rule, together in (
        (r, t) for t in ("one for both kinds", "one per kind", "sums apart") for r in RULES
    ):
        groups_of = [_group(together, kind, name) for _, kind, _, name, _, _ in cases]
        constants = {}
        for key in dict.fromkeys(groups_of):
            fit = [
                (run, row)
                for (s, k, seed, _, run, row), own in zip(cases, groups_of, strict=True)
                if own == key and s == "pypi" and seed == 0 and k in fitted
            ]
            if fit:
                constants[key] = best_constant(rule, fit)
        losses: dict[tuple[str, str], list[float]] = {}
        for (task_set, kind, _, _, run, row), key in zip(cases, groups_of, strict=True):
            if key in constants:
                loss = rule.regret(row, rule.of(run, row), constants[key])
                losses.setdefault((kind, task_set), []).append(loss)
        shown = ", ".join(f"{c:.2f}" for _, c in sorted(constants.items()))
        rows.append([rule.name, together, shown, *_losses(losses, settings)])
    shipped: dict[tuple[str, str], list[float]] = {}
    for task_set, kind, _, _, run, row in cases:
        count = len(run["about"]["merged"])
        default = get_method(row["method"]).default_scale(family(kind) == "lora", count)
        loss = (
            RULES[0].regret(row, 1.0, default.value)
            if default.value is not None
            else RULES[1].regret(row, _alignment_of(row), default.alignment or 1.0)
        )
        shipped.setdefault((kind, task_set), []).append(loss)
    rows.append(["the library's defaults", "", "", *_losses(shipped, settings)])
    heading = ["held constant", "constants", "at", *(f"{kind} {s}" for kind, s in settings), "all"]
    lines = [*_table(heading, rows), ""]
    lines += ["Alignment target a(λD) that loses least, by method and setting:", ""]
    names = sorted({name for *_, name, _, _ in cases})
    table = []
    for name in names:
        cells = []
        for kind, task_set in settings:
            fit = [(run, row) for s, k, _, n, run, row in cases if (k, s, n) == (kind, task_set, name)]
            cells.append(f"{best_constant(RULES[1], fit):.2f}" if fit else "")
        table.append([name, *cells])
    return [*lines, *_table(["method", *(f"{k} {s}" for k, s in settings)], table), ""]


def _group(together: str, kind: str, name: str) -> tuple[str, ...]:
    """The scans that share a rule's constant."""
    if together == "one for both kinds":
        return ()
    own = family(kind)
    return (own,) if together == "one per kind" else (own, str(name in SUMS))


def _losses(losses: dict[tuple[str, str], list[float]], settings: Sequence[tuple[str, str]]) -> list[str]:
    """Mean and largest loss by setting and over all scans, in points."""
    everything = [loss for found in losses.values() for loss in found]
    columns = [*(losses.get(key, []) for key in settings), everything]
    return [f"{100 * np.mean(found):.2f} ({100 * max(found):.1f})" if found else "" for found in columns]


def _widths(folder: Path) -> list[str]:
    """DC-Merge's filter on synthetic tasks of several widths."""
    path = folder / "widths.json"
    if not path.is_file():
        return []
    rows = []
    for name, row in sorted(
        read(path)["rows"].items(), key=lambda item: (item[0].split()[0], item[1]["width"])
    ):
        for rule, found in sorted(row["rules"].items(), key=lambda item: item[1]["entries_per_rank"]):
            entries = f"{found['entries_per_rank']:.1f}"
            rows.append([name, rule, entries, f"{found['cosine']:.3f}", f"{found['similarity']:.3f}"])
    return _table(["kind, width", "kept", "entries / r", "cosine to no filter", "DirSim"], rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
