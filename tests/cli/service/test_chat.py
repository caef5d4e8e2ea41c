"""`shoal run` at a terminal: a real pseudo-terminal, with a person's keys."""

from __future__ import annotations

import os
import pty
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from select import select

import pytest

from tests.cli.conftest import wait_until
from tests.cli.fake_gateway import MODEL, Cluster, download, held, instance

CTRL_C, CTRL_D = "\x03", "\x04"
_DEADLINE_S = 60.0
_PRESSES = 5
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02]")


class Terminal:
    """A program at a terminal: what it shows, and keys to press."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "shoal_cli", *arguments])

    def press(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def insist(self, keys: str, *texts: str) -> None:
        """Press keys again and again until the words are shown: readline may miss a signal as its prompt appears."""
        for _ in range(_PRESSES):
            self.press(keys)
            try:
                self.wait(*texts, deadline_s=_DEADLINE_S / _PRESSES)
            except AssertionError:
                continue
            return
        raise AssertionError(f"never {texts} for {keys!r}: {self.shown!r}")

    def wait(self, *texts: str, deadline_s: float = _DEADLINE_S) -> str:
        """Read until all words were shown in this order since the last wait; returns what was shown."""
        give_up_s = time.monotonic() + deadline_s
        wanted = re.compile(".*?".join(map(re.escape, texts)), re.DOTALL)
        while not (found := wanted.search(self.shown)):
            left_s = give_up_s - time.monotonic()
            assert left_s > 0 and self._read(left_s), f"never {texts}: {self.shown!r}"
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def _read(self, deadline_s: float) -> bool:
        readable, _, _ = select([self._fd], [], [], deadline_s)
        try:
            data = os.read(self._fd, 4096) if readable else b""
        except OSError:  # what Linux says at the end of a terminal
            data = b""
        self.shown += _CONTROLS.sub("", data.decode(errors="replace"))
        return bool(data)

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        give_up_s = time.monotonic() + _DEADLINE_S
        while self._read(max(give_up_s - time.monotonic(), 0)):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


@pytest.fixture
def terminal(cluster: Cluster) -> Iterator[Terminal]:
    cluster.instances = [instance("ready")]
    opened = Terminal("run", MODEL)
    yield opened
    opened.close()


def test_a_chat_is_kept_until_clear_and_ends_at_ctrl_d(cluster: Cluster, terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait("/exit or Ctrl-D ends", "> ")
    terminal.press("hello\r")
    terminal.wait("Blub blub.", "3 tokens", "> ")
    terminal.press("and now?\r")
    terminal.wait("Blub blub.", "> ")
    terminal.press("/clear\r")
    terminal.wait("cleared", "> ")
    terminal.press("/dance\r")
    terminal.wait("unknown command /dance", "> ")
    terminal.press("afresh\r")
    terminal.wait("Blub blub.", "> ")
    terminal.press(CTRL_D)
    assert terminal.end() == 0
    contents = [[m["content"] for m in body["messages"]] for body in cluster.asked("POST", "/v1/chat/completions")]
    assert contents == [["hello"], ["hello", "Blub blub.", "and now?"], ["afresh"]]
    history = tmp_path / "home" / "chat_history"
    assert "and now?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_answer_and_not_the_program(cluster: Cluster, terminal: Terminal) -> None:
    cluster.hold_answer = True
    terminal.wait("> ")
    terminal.press("tell me everything\r")
    terminal.wait("Blub blub.")
    terminal.press(CTRL_C)
    terminal.wait("(stopped)", "> ")
    # The gateway hears of it: the slot is free for others.
    wait_until(cluster.hung_up.is_set, "the answer was hung up")
    # Only once it is echoed: Ctrl-C makes the kernel drop what was typed and not read yet, and a readline that was
    # just told of it would then wait for it, deaf to signals, until the next key.
    terminal.press("half a line")
    terminal.wait("half a line")
    terminal.insist(CTRL_C, "Ctrl-D or /exit ends", "> ")
    cluster.hold_answer = False
    terminal.press("again\r")
    terminal.wait("Blub blub.", "> ")
    # What was said of the stopped answer is part of the conversation.
    last = cluster.asked("POST", "/v1/chat/completions")[-1]["messages"]
    assert [m["content"] for m in last] == ["tell me everything", "Blub blub.", "again"]
    terminal.press("/exit\r")
    assert terminal.end() == 0


def test_an_answer_that_fails_leaves_the_conversation_open(cluster: Cluster, terminal: Terminal) -> None:
    from shoal_common.errors import Busy

    terminal.wait("> ")
    cluster.fails = Busy("all slots are taken")
    terminal.press("hello\r")
    terminal.wait("shoal: all slots are taken", "> ")
    cluster.fails = None
    terminal.press("hello\r")
    terminal.wait("Blub blub.", "> ")
    assert len(cluster.asked("POST", "/v1/chat/completions")[-1]["messages"]) == 1
    terminal.press(CTRL_D)
    assert terminal.end() == 0


def test_a_missing_model_is_pulled_only_when_a_person_confirms(cluster: Cluster) -> None:
    for answer, code in (("n", 4), ("", 0)):
        cluster.downloads, cluster.outcomes = [[download("ready", 1000)]], {"c1": {"ok": True}}
        opened = Terminal("run", MODEL)
        try:
            opened.wait("is on no node. Pull it to node-a? [Y/n]")
            opened.press(f"{answer}\r")
            if code == 0:
                opened.wait("node-a", "100%", "ready", "> ")
                opened.press(CTRL_D)
            else:
                opened.wait("was not pulled")
            assert opened.end() == code
        finally:
            opened.close()
    assert len(cluster.asked("POST", "/v1/downloads")) == 1


def test_pull_at_a_terminal_draws_a_bar(cluster: Cluster) -> None:
    cluster.models = [held()]
    cluster.downloads = [
        [download("fetching", 250, sources={"hub": 250}, speed_bytes_per_s=100.0, eta_s=7.5)],
        [download("ready", 1000)],
    ]
    cluster.outcomes["c1"] = {"ok": True}
    opened = Terminal("pull", MODEL)
    try:
        opened.wait("25%", "250 B of 1.0 kB", "100 B/s", "8 s left", "from hub")
        opened.wait("100%", "ready on node-a")
        assert opened.end() == 0
    finally:
        opened.close()
