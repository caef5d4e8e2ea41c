"""What fits a terminal, and what does not: ids stay whole, a pipe wraps nothing, a bar keeps its place."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console

from shoal_cli.cli import run
from shoal_cli.render.console import new_console
from shoal_cli.render.progress_display import ProgressBars
from shoal_cli.render.tables import instances_table, models_table
from shoal_common.messages.views import DownloadView, InstanceView, ModelView
from tests.cli.fake_gateway import COMMIT, Cluster, download, held, instance

LONG = "mlx-community/DeepSeek-R1-Distill-Qwen-32B-Instruct-8bit-mlx"
NODES = [f"a-node-with-quite-a-long-name-{n}" for n in range(6)]
INSTANCE = "i" * 40


def text_of(renderable: object, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(renderable, crop=False)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_never_breaks_an_id(width: int) -> None:
    model = msgspec.convert(held(repo=LONG, nodes=NODES), ModelView)
    placed = msgspec.convert(instance("ready", INSTANCE, repo=LONG, nodes=NODES), InstanceView)
    for shown in (text_of(models_table([model]), width), text_of(instances_table([placed]), width)):
        assert LONG in shown
    assert all(node in text_of(models_table([model]), width) for node in NODES)
    assert INSTANCE in text_of(instances_table([placed]), width)


@pytest.mark.parametrize("arguments", [["ls"], ["ps"], ["status"], ["storage", "--all"]])
def test_nothing_wraps_in_a_pipe(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cluster.models = [held(repo=LONG, nodes=NODES)]
    cluster.instances = [instance("failed", INSTANCE, repo=LONG, error={"code": "x", "message": "why " * 40})]
    cluster.downloads = [[download("blocked", model=LONG, waiting_for="room " * 40)]]
    cluster.disks = [{"node": NODES[0], "live": True, "storage": None}]
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if LONG in line or NODES[0] in line or INSTANCE in line]
    assert rows
    assert not [line for line in lines if line.strip() in {"why", "room", *NODES[1:], COMMIT[:8]}]
    if arguments == ["ls"]:
        assert ", ".join(NODES) in rows[0]
    if arguments in (["ps"], ["status"]):
        assert any(INSTANCE in row and "why " * 40 in row for row in rows)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_pull_keeps_bar_and_percentage_on_one_line(width: int) -> None:
    state = download("fetching", 1_250_000_000, 4_000_000_000, speed_bytes_per_s=31e6, eta_s=4000.0)
    state |= {"verified_bytes": 10**9, "resumed_bytes": 10**8, "source_speeds": {"hub": 2e7, "node-bcd": 11e6}}
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with ProgressBars(console) as bars:
        bars.show(msgspec.convert(state | {"node": "studio-of-anna-x7q"}, DownloadView), {})
    lines = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[a-zA-Z]", out.getvalue()) if "studio" in line]
    assert lines
    for line in lines:
        assert re.match(r"studio-of-anna-x7q [━╸╺ ]+\s+(0|31)% +1\.2 GB of", line), line
        assert len(line.rstrip()) <= width
    assert ("…" in lines[-1]) == (width < 200)


def test_no_color_leaves_out_every_style(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = []
    for environ in ({"NO_COLOR": "1"}, {}):
        console = new_console(environ)
        with console.capture() as capture:
            console.print("[dim]words[/dim] [red]and more[/red]")
        shown.append(capture.get())
    assert shown[0] == "words and more\n"
    assert "\x1b[" in shown[1]


def test_names_alone_are_listed_one_a_line(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.models = [held(), held(commit="f" * 40), held(repo=LONG)]
    cluster.instances = [instance("ready"), instance("ready", "i2")]
    assert run(["ls", "-q"]) == run(["ps", "-q"]) == 0
    assert capsys.readouterr().out == f"org/fish\n{LONG}\ni1\ni2\n"


def test_help_and_version_have_their_usual_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert [run(["--version"]), run(["-V"]), run(["version"])] == [0, 0, 0]
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    assert run(["help", "pull"]) == run(["pull", "--help"]) == 0
    first, second = capsys.readouterr().out.split("Usage: ")[1:]
    assert first == second
