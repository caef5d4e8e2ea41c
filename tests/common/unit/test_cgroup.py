"""Memory limits of control groups, read from files as Linux writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.host.cgroup import AvailableMemory, ControlGroup, MemoryLimit, groups_of, memory_limit_of, tightest

MIB = 1 << 20
NO_LIMIT_V1 = "9223372036854771712\n"
V1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n35 31 0:32 {root} {at} rw,relatime - cgroup cgroup rw,memory\n"
V2 = "30 23 0:26 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
GROUPS = "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("path", "root", "seen"),
    [
        # The machine's own view: a unit and all groups above it.
        ("/a.slice/b.service", "/", ["/a.slice/b.service", "/a.slice", ""]),
        ("/", "/", [""]),
        # A container that sees only its own group, by the machine's names (no namespace) or its own (a namespace).
        ("/docker/0a1b", "/docker/0a1b", [""]),
        ("/docker/0a1b/sub", "/docker/0a1b", ["/sub", ""]),
        ("/sub", "/", ["/sub", ""]),
        # Mounted outside the namespace: the two groups above its root are visible.
        ("/", "/../..", [""]),
        ("/../x", "/../..", [""]),
        ("/../../x/y", "/../..", ["/x/y", "/x", ""]),
        # Moved out of what is mounted, or another's mount.
        ("/../other", "/", []),
        ("/../../x", "/..", []),
        ("/docker/0a1b", "/docker/ffff", []),
        ("/docker/0a1b", "/../other", []),
    ],
)
def test_groups_are_seen_as_far_as_they_are_mounted(path: str, root: str, seen: list[str]) -> None:
    directories = [Path(GROUPS + name) for name in seen]
    v2 = groups_of(f"0::{path}\n", V2.format(root=root, at=GROUPS))
    assert v2 == [ControlGroup(2, directory) for directory in directories]
    v1 = groups_of(f"9:cpu,memory:{path}\n8:pids:/p\n0::/q\n", V1.format(root=root, at=GROUPS))
    assert v1 == [ControlGroup(1, directory) for directory in directories]


def test_both_hierarchies_are_read_and_unknown_lines_skipped() -> None:
    membership = "4:memory:/v1\n1:name=systemd:/s\n0::/v2\n\nnonsense\n"
    mounts = V1.format(root="/", at=r"/my\040groups/memory") + "\nnonsense\n" + V2.format(root="/", at="/two")
    assert [(g.version, str(g.directory)) for g in groups_of(membership, mounts)] == [
        (1, "/my groups/memory/v1"),
        (1, "/my groups/memory"),
        (2, "/two/v2"),
        (2, "/two"),
    ]
    assert groups_of("", mounts) == groups_of(membership, "") == []


def v1(limit: str, used: int, inactive: int = 0, active: int = 0, above: str = NO_LIMIT_V1) -> dict[str, str]:
    stat = f"cache 1\nrss 2\ninactive_file 3\nactive_file 4\nhierarchical_memory_limit {above.strip()}\n"
    stat += f"total_inactive_anon 5\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def v2(limit: str, used: int, high: str = "max", **stat: int) -> dict[str, str]:
    pages = "".join(f"{name} {size}\n" for name, size in {"anon": 1, "file": 2, **stat}.items())
    return {
        "memory.max": f"{limit}\n",
        "memory.high": f"{high}\n",
        "memory.current": f"{used}\n",
        "memory.stat": pages,
    }


def test_a_groups_capacity_is_its_limit_less_unreclaimable_bytes() -> None:
    one, two = ControlGroup(1, Path("/1")), ControlGroup(2, Path("/2"))
    assert memory_limit_of(one, v1("100\n", 70, 20, 10)) == MemoryLimit(100, 60, 30, Path("/1"))
    assert memory_limit_of(two, v2("100", 70, inactive_file=20, active_file=10)) == MemoryLimit(
        100, 60, 30, Path("/2")
    )
    assert memory_limit_of(two, v2("100", 70, slab_reclaimable=5, inactive_file=20)) == MemoryLimit(
        100, 55, 30, Path("/2")
    )
    # A limit whose excess is throttled (memory.high), and that of an invisible group.
    assert memory_limit_of(two, v2("max", 70, "90", active_file=30)) == MemoryLimit(90, 50, 20, Path("/2"))
    assert memory_limit_of(one, v1(NO_LIMIT_V1, 70, 20, 10, above="80")) == MemoryLimit(80, 40, 10, Path("/1"))
    # Over the limit, for a moment or since it was lowered.
    assert memory_limit_of(two, v2("50", 70)) == MemoryLimit(50, 0, 0, Path("/2"))
    assert memory_limit_of(two, v2("0", 0)) == MemoryLimit(0, 0, 0, Path("/2"))


@pytest.mark.parametrize(
    "files",
    [
        {},
        v2("max", 70),
        v2("-1", 70),
        {**v2("100", 70), "memory.current": "?"},
        {"memory.max": "100\n"},
        {**v2("", 70), "memory.stat": "nonsense\n\n"},
    ],
)
def test_a_group_without_a_limit_file_has_no_limit(files: dict[str, str]) -> None:
    assert memory_limit_of(ControlGroup(2, Path("/2")), files) is None


@given(st.lists(st.tuples(*[st.integers(0, 1 << 40)] * 3), min_size=1))
def test_each_of_them_holds(sizes: list[tuple[int, int, int]]) -> None:
    room = tightest([MemoryLimit(*s) for s in sizes])
    for total, available, free in sizes:
        assert room.total_bytes <= total and room.available_bytes <= available and room.free_bytes <= free
    assert {room.total_bytes, room.available_bytes, room.free_bytes} <= {size for s in sizes for size in s}


# The files of a process


class Machine:
    """What Linux shows of one process in a unit in a slice, version 2, and a clock."""

    def __init__(self, root: Path) -> None:
        self.slice, self.unit, self.now_s = root / "groups" / "s", root / "groups" / "s" / "u", 0.0
        self.unit.mkdir(parents=True)
        (root / "proc").mkdir()
        (root / "proc" / "cgroup").write_text("0::/s/u\n")
        (root / "proc" / "mountinfo").write_text(V2.format(root="/", at=root / "groups"))
        self.write_files(self.slice, v2("max", 70 * MIB))
        self.write_files(self.unit, v2("max", 70 * MIB))
        self.memory = AvailableMemory(root / "proc", lambda: self.now_s)

    def write_files(self, group: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (group / name).write_text(text)

    def seen(self) -> list[tuple[Path | None, int]]:
        machine, *groups = self.memory.read()
        assert machine.group is None and machine.total_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf(
            "SC_PHYS_PAGES"
        )
        return [(r.group, r.available_bytes // MIB) for r in groups]


def test_a_limit_is_read_each_time_and_a_new_one_within_a_minute(tmp_path: Path) -> None:
    here = Machine(tmp_path)
    assert here.seen() == []
    here.write_files(here.slice, v2(str(100 * MIB), 70 * MIB))
    here.now_s = 59.0
    assert here.seen() == []
    here.now_s = 61.0
    assert here.seen() == [(here.slice, 30)]
    here.write_files(here.slice, v2(str(200 * MIB), 80 * MIB))
    assert here.seen() == [(here.slice, 120)]
    here.write_files(here.unit, v2(str(90 * MIB), 80 * MIB))
    here.now_s = 122.0
    assert here.seen() == [(here.unit, 10), (here.slice, 120)]
    # A lifted limit does not count any more, nor does that of a removed group.
    here.write_files(here.unit, v2("max", 80 * MIB))
    assert here.seen() == [(here.slice, 120)]
    for file in here.slice.glob("memory.*"):
        file.unlink()
    assert here.seen() == []


def test_a_limit_beyond_what_the_machine_has_is_none(tmp_path: Path) -> None:
    here = Machine(tmp_path)
    here.write_files(here.unit, v2(str(1 << 62), 1))
    assert here.seen() == []


def test_where_there_are_no_control_groups_there_are_no_limits(tmp_path: Path) -> None:
    assert len(AvailableMemory(tmp_path / "nothing").read()) == 1


def test_the_limits_of_this_process_are_those_of_linux() -> None:
    for room in AvailableMemory().read()[1:]:
        assert room.group is not None and room.group.is_dir()
        assert 0 <= room.free_bytes <= room.available_bytes <= room.total_bytes
