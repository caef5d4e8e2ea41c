"""The command line's own manners: its help, the README's table of commands, completion, and what it imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_cli.cli import SECTIONS, run
from tests.cli.fake_gateway import MODEL, Cluster, held, instance
from tests.harness.process import source_path

ROOT = Path(__file__).parents[3]
VERBS = [verb for verbs in SECTIONS.values() for verb in verbs]
Capture = pytest.CaptureFixture[str]


def started(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": source_path(), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def complete(line: str, **environ: str) -> list[str]:
    """What bash is offered at the end of a line."""
    parts = line.split(" ")
    done = started(
        "-m",
        "shoal_cli",
        **{"_SHOAL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(parts) - 1), **environ},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_every_verb_is_in_one_section_and_fits_a_line(capsys: Capture) -> None:
    assert len(VERBS) == len(set(VERBS)) == 32
    modules = {p.stem for p in (ROOT / "cli/shoal_cli/commands").glob("*.py")}
    assert modules == {*VERBS, "__init__", "options", "setting_options", "completion"}
    assert run([]) == 0
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"^  {verb} +\S.*\.$", shown, re.MULTILINE), verb
    assert "..." not in shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_does_nothing_else_with_it(capsys: Capture, verb: str) -> None:
    for option in ("--help", "-h"):
        assert run([verb, option]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: shoal {verb} [OPTIONS]")


def test_the_readmes_table_has_every_verb_and_real_options(capsys: Capture) -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## Commands") : text.index("`shoal COMMAND --help`")]
    named: set[str] = set()
    for row in table.splitlines():
        first = next(iter(re.findall(r"^\| `shoal (\w+)", row)), "")
        # Further commands of a row are written without `shoal`; an action also without its verb.
        for command in re.findall(r"`(?:shoal )?([^`]+)`", row.split(" | ")[0]):
            verbs = [w for w in command.split() if w.islower() and w.isalpha()]
            verb = verbs[0] if verbs and verbs[0] in VERBS else first
            named.add(verb)
            path = [verb, *[w for w in verbs if w != verb and verb in ("storage", "node", "transfer")]]
            options = re.findall(r"(?<!\S)--?[a-z][a-z-]*", command)
            if options:
                assert run([*path, "--help"]) == 0
                shown = capsys.readouterr().out
                if not all(re.search(rf"(?<!\S){o}\b", shown) for o in options):
                    assert run([*path, "set", "--help"]) == 0, command
                    shown = capsys.readouterr().out
                assert all(re.search(rf"(?<!\S){o}\b", shown) for o in options), command
    assert named == set(VERBS)


def test_the_shell_completes_verbs_actions_options_and_choices() -> None:
    assert complete("shoal pl") == ["place"]
    assert complete("shoal storage un") == ["unpin"]
    assert complete("shoal storage set --add") == ["--add-library", "--add-volume"]
    assert complete("shoal place x --objective t") == ["throughput"]
    assert complete("shoal restart n") == ["nats"]


def test_the_shell_completes_models_nodes_and_instances(cluster: Cluster) -> None:
    cluster.models, cluster.instances = [held()], [instance("ready")]
    assert complete("shoal rm org/") == [MODEL]
    assert complete("shoal pull org/x --node node-") == ["node-a", "node-b"]
    assert complete("shoal stop ") == ["i1", MODEL]
    gateway = os.environ["SHOAL_GATEWAY"]
    assert complete(f"shoal rm --gateway {gateway} or", SHOAL_GATEWAY="127.0.0.1:9") == [MODEL]


def test_completion_offers_nothing_silently_without_a_node(tmp_path: Path) -> None:
    for gateway in ("127.0.0.1:9", "not a url"):
        assert complete("shoal rm or", SHOAL_HOME=str(tmp_path), SHOAL_GATEWAY=gateway) == []


def test_the_completion_script_is_printed_for_a_shell() -> None:
    # Typer's own switch for tests: a test has no shell above it to detect.
    switch = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = started("-m", "shoal_cli", "--show-completion", "bash", **switch)
    assert done.returncode == 0 and "_SHOAL_COMPLETE=complete_bash" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["version"], ["pydantic", "httpx2", "rich", "nats"]),
        (["ls", "--gateway", "127.0.0.1:9"], ["pydantic", "nats"]),
        (["place", MODEL, "--nodes", "2", "--gateway", "127.0.0.1:9"], ["pydantic", "nats"]),
    ],
)
def test_a_command_waits_for_no_import_that_it_does_not_use(arguments: list[str], absent: list[str]) -> None:
    code = f"import sys; from shoal_cli.cli import run; run({arguments!r}); print(*sorted(sys.modules), sep=chr(10))"
    loaded = set(started("-c", code).stdout.split())
    assert "typer" in loaded and not loaded & set(absent)


def test_demo_passes_its_arguments_on_but_help(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _path, arguments: called.append(arguments))
    assert run(["demo", "--nodes", "5", "x", "-v"]) == 0
    assert called[0][1:] == ["-P", "-m", "shoal_demo", "--nodes", "5", "x", "-v"]
    assert run(["demo", "--help"]) == 0 and len(called) == 1
