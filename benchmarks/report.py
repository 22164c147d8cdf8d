"""Turns the JSON of `make bench` into one Markdown page: `python -m benchmarks.report ops.json > ops.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def milliseconds(entry: dict[str, Any]) -> float:
    return 1e3 * float(entry["stats"]["median"])


def rate(entry: dict[str, Any]) -> str:
    info, seconds = entry["extra_info"], float(entry["stats"]["median"])
    text = f"{info['bytes_moved'] / seconds / 1e9:.1f} GB/s"
    return f"{text}, {info['flops'] / seconds / 1e9:.0f} GFLOP/s" if info["flops"] else text


def report(results: dict[str, Any]) -> str:
    """Writes a table per op: medians of both backends, their ratio, and the rate of the faster one."""
    machine = results["machine_info"]["dirmerge"]
    timers = {entry["options"]["timer"] for entry in results["benchmarks"]}
    clocks = {"perf_counter": "wall time", "process_time": "CPU time, on a busy machine,"}
    clock = ", ".join(clocks.get(timer, timer) for timer in sorted(timers))
    lines = [
        "# Ops: native against torch",
        "",
        f"Medians of {clock} over 5 to 50 rounds of one run, both backends side by side, every result",
        "checked before it was timed. torch is the op's torch implementation; GB/s counts each input and",
        "output once.",
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads.",
        f"torch {machine['torch']}, dirmerge {machine['dirmerge']} built by {machine['native']}.",
    ]
    ops: dict[str, dict[tuple[str, str], dict[str, dict[str, Any]]]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        if "backend" not in info:
            continue
        op = entry["name"].split("[")[0].removeprefix("test_")
        ops.setdefault(op, {}).setdefault((info["case"], info["dtype"]), {})[info["backend"]] = entry
    for op, cases in ops.items():
        lines += ["", f"## {op}", "", "| case | dtype | torch ms | native ms | torch / native | rate |"]
        lines.append("|---|---|---:|---:|---:|---|")
        for (case, dtype), found in cases.items():
            torch_ms = milliseconds(found["torch"])
            if "native" in found:
                native_ms = milliseconds(found["native"])
                numbers = f"{native_ms:.3g} | {torch_ms / native_ms:.1f}"
            else:
                numbers = "none | "
            best = min(found.values(), key=milliseconds)
            lines.append(f"| {case} | {dtype} | {torch_ms:.3g} | {numbers} | {rate(best)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(report(json.loads(Path(sys.argv[1]).read_text())))
