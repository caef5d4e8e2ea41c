"""`make bench`: run every bench script and write docs/benchmarks.md. `--quick`: the same figures with less work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from figures import Figure, Report

HERE = Path(__file__).parent
_NOT_SCRIPTS = {"run.py", "figures.py", "netns.py", "simulate.py", "torrent.py", "touched.py"}
_DEADLINE_S = 1800


def main() -> int:
    """Run all; returns 1 if a script could not measure."""
    failed = []
    rows: list[str] = []
    measured_on: dict[str, str | int] = {}
    for script in sorted(p for p in HERE.glob("*.py") if p.name not in _NOT_SCRIPTS):
        print(f"== {script.name}", flush=True)
        result = subprocess.run(
            [sys.executable, str(script), *sys.argv[1:]],
            stdout=subprocess.PIPE,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
        if result.returncode != 0:
            failed.append(script.name)
            continue
        last = msgspec.json.decode(result.stdout.splitlines()[-1], type=Report)
        measured_on = last.machine
        rows += [row(script.stem, name, f) for name, f in last.figures.items()]
    facts = ", ".join(f"{k} {v}" for k, v in measured_on.items())
    page = [
        "# Benchmarks",
        "",
        f"Written by `make bench`. Measured on: {facts}. Each anchor ran in the same script, interleaved with ours;",
        "values are medians. Compare ratios, not absolute values.",
        "",
        "| script | figure | value | target | holds |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(page))
    for name in failed:
        print(f"{name} could not measure", file=sys.stderr)
    return 1 if failed else 0


def row(script: str, name: str, f: Figure) -> str:
    """One line of the table."""
    holds = {True: "yes", False: "**no**", None: ""}[f.holds]
    return f"| {script} | `{name}` | {f.value:g} {f.unit} | {f.target} | {holds} |"


if __name__ == "__main__":
    sys.exit(main())
