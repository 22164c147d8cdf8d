"""Runs the benchmarks of ops and algorithms: `make bench`, `make bench-gpu`.

    python -m benchmarks --ops polar,gram --shapes llama7b --dtypes float16 --device cuda --slow-cases

The result is benchmarks/results/last.json, which git ignores, for benchmarks.report --against. A run of
everything becomes bench_cpu.json or bench_cuda.json there, and the page is written anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report

HERE = Path(__file__).parent


def main() -> None:
    """Runs pytest on the benchmarks, then the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("ops", "shapes", "dtypes"):
        parser.add_argument(f"--{name}", default="", help="with commas; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default cuda where there is a GPU")
    parser.add_argument("--slow-cases", action="store_true", help="also what takes 30 s a call or more")
    arguments, others = parser.parse_known_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("No GPU that torch can use: there is nothing to benchmark on one.")
        return
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = [f"--device={device}", *(["--slow-cases"] if arguments.slow_cases else [])]
    options += [
        f"--{name}={getattr(arguments, name)}"
        for name in ("ops", "shapes", "dtypes")
        if getattr(arguments, name)
    ]
    narrowed = arguments.ops or arguments.shapes or arguments.dtypes
    # A run that is broken off leaves the last whole one as it is.
    target = HERE / "results" / "last.json"
    kept = ["--benchmark-enable", f"--benchmark-json={target}", "--benchmark-columns=median,iqr,rounds"]
    code = pytest.main([str(HERE), *kept, *options, *others])
    if code == 0 and not narrowed:
        target.replace(target.with_name(f"bench_{device}.json"))
        report.PAGE.write_text(report.page())
    sys.exit(code)


if __name__ == "__main__":
    main()
