"""Storage's critical section: what may run inside it, which a token shows and the source is held to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shoal_storage
from shoal_storage.section import CriticalSection


def _awaits_inside(body: list[ast.stmt]) -> list[ast.Await]:
    return [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Await)]


def _takes_token(function: ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(a.annotation or ast.Constant("")) == "Held" for a in function.args.args)


def _is_allowed(call: ast.expr) -> bool:
    if not isinstance(call, ast.Call):
        return False
    if ast.unparse(call.func) == "asyncio.to_thread":
        return True
    return any(isinstance(a, ast.Name) and a.id == "held" for a in call.args)


def test_the_section_awaits_only_disk_and_functions_that_hold_it() -> None:
    """So there is no sleep, no NATS and no other service inside, however deep the calls go."""
    refused, seen = [], 0
    for path in Path(shoal_storage.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            inside = (isinstance(node, ast.AsyncFunctionDef) and _takes_token(node)) or (
                isinstance(node, ast.AsyncWith)
                and any(ast.unparse(item.context_expr).endswith(".section") for item in node.items)
            )
            if not inside:
                continue
            assert isinstance(node, ast.AsyncFunctionDef | ast.AsyncWith)
            awaits = _awaits_inside(node.body)
            waits = [n for s in node.body for n in ast.walk(s) if isinstance(n, ast.AsyncFor | ast.AsyncWith)]
            refused += [f"{path.name}:{n.lineno}: {ast.unparse(n)}" for n in awaits if not _is_allowed(n.value)]
            refused += [f"{path.name}:{n.lineno}: {ast.unparse(n)[:60]}" for n in waits]
            seen += len(awaits)
    assert not refused, "\n".join(refused)
    assert seen > 80, "the section is no longer found"


async def test_a_token_is_valid_only_while_the_section_is_held() -> None:
    section = CriticalSection()
    async with section as held:
        held.require()
        with pytest.raises(AssertionError, match="holds the critical section already"):
            async with section:
                pass
    with pytest.raises(AssertionError, match="has been left"):
        held.require()
