"""`make bench`: run every benchmark and write docs/benchmarks.md. `--quick` measures the same with less work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from figures import Figure, Report

HERE = Path(__file__).parent
_NOT_SCRIPTS = {
    "run.py",
    "figures.py",
    "netns.py",
    "simulated_nodes.py",
    "swarm_simulator.py",
    "transfer_site.py",
    "libtorrent_peer.py",
    "warm_memory.py",
}
_DEADLINE_S = 1800


def main() -> int:
    """Run all benchmarks; return 1 if one failed."""
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
        f"Written by `make bench`. Measured on: {facts}. Each baseline ran in the same",
        "script, interleaved with Shoal; values are medians. Compare ratios, not absolute values.",
        "",
        "| script | figure | value | target | holds |",
        "| --- | --- | --- | --- | --- |",
        *rows,
        "",
    ]
    (HERE.parent / "docs" / "benchmarks.md").write_text("\n".join(page))
    for name in failed:
        print(f"{name} failed; its figures are missing", file=sys.stderr)
    return 1 if failed else 0


def row(script: str, name: str, f: Figure) -> str:
    """Return a line of the table."""
    holds = {True: "yes", False: "**no**", None: ""}[f.holds]
    return f"| {script} | `{name}` | {f.value:g} {f.unit} | {f.target} | {holds} |"


if __name__ == "__main__":
    sys.exit(main())
