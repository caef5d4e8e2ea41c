"""docs/protocol.md lists exactly the events that services emit."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def emitted_in_code() -> dict[str, set[str]]:
    """Return the services that emit each event; `<service>` for events of the common code."""
    found: dict[str, set[str]] = {}
    for path in [*ROOT.glob("libs/common/shoal_common/**/*.py"), *ROOT.glob("services/*/shoal_*/**/*.py")]:
        service = path.relative_to(ROOT).parts[1] if path.is_relative_to(ROOT / "services") else "<service>"
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and re.search(
                r"\bevents\.emit$", ast.unparse(call.func).replace("_events", "events")
            ):
                name = call.args[0]
                assert isinstance(name, ast.Constant), (
                    f"{path.name}:{call.lineno} emits an event that has no fixed name"
                )
                found.setdefault(str(name.value), set()).add(service)
    return found


def listed_in_page() -> dict[str, set[str]]:
    """Return the services of each event in the table of docs/protocol.md."""
    page = (ROOT / "docs" / "protocol.md").read_text()
    section = page.split("\n## Events\n")[1].split("\n## ")[0]
    found: dict[str, set[str]] = {}
    for service, name in re.findall(r"^\| `….([\w<>]+)\.<node>\.(\w+)` \|", section, re.MULTILINE):
        found.setdefault(name, set()).add(service)
    return found


def test_the_page_lists_every_event_with_its_emitter() -> None:
    assert emitted_in_code() == listed_in_page()
    assert "model_ready" in emitted_in_code()
