"""Single keys of node.toml are changed: nothing else is lost, and a crash leaves the old file or the new one."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_common.config import read_settings_file
from shoal_common.errors import BadInput, InternalError, Refused
from shoal_common.settings.declaration import Value
from shoal_common.settings.values import with_changes
from shoal_common.settings_file import change_settings, edit_text
from tests.harness.process import node_environment, started


def change(home: Path, changes: dict[str, Value]) -> None:
    change_settings(home, {"storage": changes}, lambda _: None)


KEYS = ("max_storage_bytes", "eviction_policy", "headroom_bytes", "libraries")

# Lines as people write them. `%d` makes each comment unique, so that none can stand for another.
_TOP = [
    'id = "a" # c%d',
    "# c%d",
    "",
    'nats = [ # c%d\n  "nats://h:4222",\n]',
    "storage_note = '''\n[storage]\n# no comment'''",
]
_IN_STORAGE = [
    "# c%d",
    "",
    "   # c%d",
    'path = "/models"  # c%d',
    "max_storage_bytes = 500   # c%d",
    "headroom_bytes=1_000# c%d",
    "  eviction_policy = 'manual'",
    '"a quoted key" = [1, 2] # c%d',
    "deep.er = true # c%d",
    "headroom_bytes.x = 1",
    'libraries = ["/a"] # c%d',
]
_AFTER = ["[gateway] # c%d", "gap_s = 0.5 # c%d", "# c%d", "", "[commands]\nstorage = ['x'] # c%d", "[[list]]\n# c%d"]


@st.composite
def files(draw: st.DrawFn) -> str:
    """Draw a node.toml: with or without [storage], text before and after it, with or without a final newline."""
    storage = draw(st.sampled_from(["[storage]", "[ storage ] # c%d", "", "storage = {path = 'x'} # c%d"]))
    lines: list[str] = []
    for pool in (_TOP, [storage], _IN_STORAGE if "[" in storage else [], _AFTER):
        size = 1 if pool == [storage] else draw(st.integers(0, len(pool)))
        lines += [storage] if pool == [storage] else draw(st.permutations(pool))[:size]
    text = "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n\n"]))
    text = re.sub("c%d", lambda m: f"c{m.start()}", text)
    return text.replace("\n", draw(st.sampled_from(["\n", "\n", "\r\n"])))


_LISTS = st.sampled_from([["/a", "/b"], ["/b"], []])
CHANGES = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(st.none(), st.integers(0, 2**62), st.sampled_from(["lru", "manual"]), _LISTS)
)


def _comments(text: str) -> list[str]:
    return re.findall(r"# (?:c\d+|no comment)", text)


def _parses(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(files().filter(_parses), st.lists(CHANGES, max_size=5))
def test_any_changes_keep_every_comment_and_every_foreign_key(text: str, sequence: list[dict[str, Value]]) -> None:
    for changes in sequence:
        wanted = with_changes(tomllib.loads(text), "storage", changes)
        after = text if wanted == tomllib.loads(text) else edit_text(text, "storage", changes)
        assert after is not None
        assert tomllib.loads(after) == wanted
        assert _comments(after) == _comments(text)
        kept = [line for line in text.splitlines() if not any(k in line for k in KEYS) and "{" not in line]
        rest = iter(after.splitlines())
        assert all(line in rest for line in kept if line), "every other line is there, in its order"
        text = after


def test_a_list_is_edited_in_place_and_keeps_comments_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_text('[storage]\nlibraries = [ # mine\n  "/x", # the NAS\n  # old\n  "/y",\n] # end\n')
    change(tmp_path, {"libraries": ["/x", "/z"]})
    text = path.read_text()
    assert read_settings_file(tmp_path) == {"storage": {"libraries": ["/x", "/z"]}}
    assert all(comment in text for comment in ("# mine", "# the NAS", "# old", "# end"))
    change(tmp_path, {"libraries": ["/z", "/x"]})
    assert read_settings_file(tmp_path) == {"storage": {"libraries": ["/z", "/x"]}}
    change(tmp_path, {"libraries": None})
    assert read_settings_file(tmp_path) == {"storage": {}} and "# end" in path.read_text()
    change(tmp_path, {"libraries": ["/a", "/b"]})
    assert 'libraries = ["/a", "/b"]' in path.read_text()


def test_a_change_reads_as_a_person_would_have_written_it(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(
        '# mine\nid = "a"\n\n[storage]\npath = "/models"  # the big disk\nmax_storage_bytes = 500   # half\n\n'
        "# how long it waits\n[gateway]\ngap_s = 0.5\n"
    )
    change(tmp_path, {"max_storage_bytes": 700, "eviction_policy": "lru"})
    assert (tmp_path / "node.toml").read_text() == (
        '# mine\nid = "a"\n\n[storage]\npath = "/models"  # the big disk\nmax_storage_bytes = 700   # half\n'
        'eviction_policy = "lru"\n\n# how long it waits\n[gateway]\ngap_s = 0.5\n'
    )
    change(tmp_path, {"max_storage_bytes": None})
    assert (tmp_path / "node.toml").read_text() == (
        '# mine\nid = "a"\n\n[storage]\npath = "/models"  # the big disk\n# half\n'
        'eviction_policy = "lru"\n\n# how long it waits\n[gateway]\ngap_s = 0.5\n'
    )


def test_a_home_without_a_file_gets_one(tmp_path: Path) -> None:
    change(tmp_path / "home", {"headroom_bytes": 5})
    assert read_settings_file(tmp_path / "home") == {"storage": {"headroom_bytes": 5}}


def test_what_is_so_already_is_not_written_again(tmp_path: Path) -> None:
    change(tmp_path, {"headroom_bytes": 5})
    before = (tmp_path / "node.toml").stat()
    change(tmp_path, {"headroom_bytes": 5, "max_storage_bytes": None})
    after = (tmp_path / "node.toml").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_to_the_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    kept, home = tmp_path / "dotfiles" / "shoal.toml", tmp_path / "home"
    home.mkdir()
    kept.write_text("# mine\n")
    (home / "node.toml").symlink_to(kept)
    change(home, {"headroom_bytes": 5})
    assert (home / "node.toml").is_symlink() and "headroom_bytes = 5" in kept.read_text()


@pytest.mark.parametrize(
    ("text", "error", "expected"),
    [
        ("[storage\n", BadInput, "node.toml cannot be read"),
        ("x = " + "[" * 5000, BadInput, "node.toml cannot be read"),
        ("x = " + "1" * 5000, BadInput, "node.toml cannot be read"),
        ("storage = 5\n", Refused, "write it as a section"),
        ("[[storage]]\na = 1\n", Refused, "write it as a section"),
        ("[storage]\na=1\n[other]\n[storage.deep]\nc=1\n", Refused, "by hand"),
    ],
)
def test_a_file_that_cannot_be_edited_safely_is_left_untouched(
    tmp_path: Path, text: str, error: type[Exception], expected: str
) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(error, match=expected):
        change(tmp_path, {"headroom_bytes": 5})
    assert (tmp_path / "node.toml").read_text() == text


def test_what_the_caller_does_not_accept_is_not_written(tmp_path: Path) -> None:
    def no(settings: dict[str, object]) -> None:
        raise BadInput(f"not {settings}")

    with pytest.raises(BadInput, match="'headroom_bytes': 5"):
        change_settings(tmp_path, {"storage": {"headroom_bytes": 5}}, no)
    assert not (tmp_path / "node.toml").exists()


def test_a_file_that_cannot_be_written_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("# mine\n")
    (tmp_path / "node.toml.new").mkdir()  # blocks the new file, also for root
    with pytest.raises(InternalError, match="cannot be written: Is a directory; nothing was changed"):
        change(tmp_path, {"headroom_bytes": 5})
    assert (tmp_path / "node.toml").read_text() == "# mine\n"


CHANGE = """
import os, pathlib, signal, sys
from shoal_common import settings_file
home, when = pathlib.Path(sys.argv[1]), sys.argv[2]
replace, fsync = pathlib.Path.replace, os.fsync

def die_then_replace(self, target):
    if when == "before rename":
        os.kill(os.getpid(), signal.SIGKILL)
    renamed = replace(self, target)
    if when == "after rename":
        os.kill(os.getpid(), signal.SIGKILL)
    return renamed

def die_then_sync(fd):
    if when == "before fsync":
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)

pathlib.Path.replace, os.fsync = die_then_replace, die_then_sync
settings_file.change_settings(home, {"storage": {"headroom_bytes": 6}}, lambda _: None)
"""


@pytest.mark.parametrize(("when", "expected"), [("before fsync", 5), ("before rename", 5), ("after rename", 6)])
async def test_I6_a_kill_leaves_the_old_or_new_file_and_edits_go_on(tmp_path: Path, when: str, expected: int) -> None:
    change(tmp_path, {"headroom_bytes": 5})
    async with started("-c", CHANGE, str(tmp_path), when, environment=node_environment(tmp_path, "")) as process:
        assert await process.wait_exit() == -9, process.output
    assert read_settings_file(tmp_path) == {"storage": {"headroom_bytes": expected}}
    change(tmp_path, {"headroom_bytes": 7})
    assert read_settings_file(tmp_path) == {"storage": {"headroom_bytes": 7}}


ORDER = """
import os, pathlib, stat, sys
from shoal_common import settings_file
replace, fsync = pathlib.Path.replace, os.fsync

def say_and_replace(self, target):
    print("order rename", flush=True)
    return replace(self, target)

def say_and_sync(fd):
    kind = "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"file of {os.fstat(fd).st_size} bytes"
    print("order fsync", kind, flush=True)
    fsync(fd)

pathlib.Path.replace, os.fsync = say_and_replace, say_and_sync
settings_file.change_settings(pathlib.Path(sys.argv[1]), {"storage": {"headroom_bytes": 6}}, lambda _: None)
"""


async def test_I6_file_synced_before_rename_and_rename_before_ack(
    tmp_path: Path,
) -> None:
    async with started("-c", ORDER, str(tmp_path), environment=node_environment(tmp_path, "")) as process:
        assert await process.wait_exit() == 0, process.output
    written = (tmp_path / "node.toml").stat().st_size
    assert process.lines == [f"order fsync file of {written} bytes", "order rename", "order fsync directory"]


async def test_changes_made_at_once_all_stay(tmp_path: Path) -> None:
    changes: list[dict[str, Value]] = [{key: n} for n, key in enumerate(KEYS)]
    await asyncio.gather(*(asyncio.to_thread(change, tmp_path, c) for c in changes))
    assert read_settings_file(tmp_path) == {"storage": {key: n for n, key in enumerate(KEYS)}}
