"""Power cuts (I6): the image below a mounted file system is copied while a life goes on above it.

That is what a disk holds when the power goes. The copy is mounted, which replays its journal, and a store is opened.

Only what was made durable reaches the image: the journal's own timer is set far off, and the life waits while the
image is copied.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.process import checked_run, source_path
from tests.storage.durability_checks import Acknowledged

DEADLINE_S = 60
MAX_COPIES = 50
SIZES_MIB = {"ext4": 24, "xfs": 320}
OPTIONS = {"ext4": "loop,commit=600", "xfs": "loop"}
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard"), "xfs": ("mkfs.xfs", "-q", "-f", "-K")}


def _can_mount(kind: str) -> str:
    """Why this machine cannot run these tests; "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can mount images"
    if shutil.which(MAKE[kind][0]) is None:
        return f"there is no {MAKE[kind][0]} (scripts/system-packages.sh test installs it)"
    with tempfile.TemporaryDirectory() as name:
        image, at = Path(name) / "image", Path(name) / "at"
        make_image(kind, image)
        at.mkdir()
        tried = subprocess.run(mounting(kind, image, at), capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            subprocess.run(["umount", at], check=True)
        return tried.stderr.strip()


def make_image(kind: str, image: Path) -> None:
    """An empty file system in a sparse file."""
    with image.open("wb") as f:
        f.truncate(SIZES_MIB[kind] << 20)
    checked_run(*MAKE[kind], image, timeout_s=DEADLINE_S)


def mounting(kind: str, image: Path, at: Path) -> list[str]:
    """The command that mounts an image. A copy of a mounted XFS has the same id as the original."""
    options = OPTIONS[kind] + (",nouuid" if kind == "xfs" else "")
    return ["mount", "-t", kind, "-o", options, str(image), str(at)]


@contextmanager
def mounted(kind: str, image: Path, at: Path) -> Iterator[Path]:
    """A mounted image, while the body runs."""
    at.mkdir(exist_ok=True)
    checked_run(*mounting(kind, image, at), timeout_s=DEADLINE_S)
    try:
        yield at
    finally:
        checked_run("umount", at, timeout_s=DEADLINE_S)


def copy_at_one_moment(image: Path, copy: Path) -> None:
    """Copy an image while nothing is written to it: a busy machine writes back when it likes."""
    for _ in range(MAX_COPIES):
        with image.open("rb") as f:
            os.fsync(f.fileno())  # of the image file, not of its contents: holes are where nothing was ever written
        before_ns = image.stat().st_mtime_ns
        checked_run("cp", "--sparse=always", image, copy, timeout_s=DEADLINE_S)
        if image.stat().st_mtime_ns == before_ns:
            return
    raise AssertionError(f"{image} never stood still")


class Cuts:
    """A life above an image, and what a power cut would leave of it."""

    def __init__(self, kind: str, directory: Path, has_volume: bool = False) -> None:
        self.kind, self.directory, self.has_volume = kind, directory, has_volume
        self.image = directory / "image"
        self.copies = 0
        make_image(kind, self.image)

    def _volume_path(self, at: Path) -> Path | None:
        # On the same image: one copy has the whole machine at one moment.
        return at / "volume" if self.has_volume else None

    def run(self, every: int, *left_out: str) -> tuple[int, list[str]]:
        """Cut a life at every n-th change and after each acknowledgement. Returns the cuts and the violations."""
        wrong: list[str] = []
        cuts = changes = 0
        acknowledged = Acknowledged()
        with mounted(self.kind, self.image, self.directory / "live") as live:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.storage.crash_child_store",
                    str(live / "store"),
                    str(self._volume_path(live) or ""),
                    *left_out,
                ],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": source_path(), "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            try:
                for line in process.stdout:
                    kind, _, rest = line.strip().partition(" ")
                    changes += kind == "at"
                    if kind == "ack":
                        what, _, which = rest.partition(" ")
                        acknowledged.hear(what, which)
                    if kind == "ack" or changes % every == 0:
                        cuts += 1
                        if reason := self.after_a_cut(acknowledged):
                            wrong.append(f"cut at {rest}: {reason}")
                    process.stdin.write("\n")
                    process.stdin.flush()
                assert process.wait(DEADLINE_S) == 0, process.stderr.read()
            finally:
                process.kill()
                process.communicate()
        assert not acknowledged.may_be_pinned, "the life has ended early"
        return cuts, wrong

    def after_a_cut(self, acknowledged: Acknowledged) -> str:
        """The violation in the store after a cut now; "" if there is none."""
        # A new file each time: a device that still has the last copy is never mistaken for this one.
        self.copies += 1
        copy = self.directory / f"copy-{self.copies}"
        copy_at_one_moment(self.image, copy)
        try:
            return self._violation_in(copy, acknowledged)
        finally:
            copy.unlink()

    def _violation_in(self, copy: Path, acknowledged: Acknowledged) -> str:
        with mounted(self.kind, copy, self.directory / "after") as at:
            try:
                acknowledged.hold(at / "store", self._volume_path(at))
            except (AssertionError, OSError) as e:
                return str(e) or type(e).__name__
            except Exception as e:  # noqa: BLE001  # whatever keeps a start from starting is what is looked for
                return f"the start failed: {e!r}"
        return ""


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("kind", "has_volume"), [("ext4", False), ("xfs", False), ("ext4", True)])
def test_I6_I1_I2_a_power_cut_at_any_moment_loses_nothing_acked(
    in_memory: Path, kind: str, has_volume: bool, every: int
) -> None:
    if reason := _can_mount(kind):
        pytest.skip(f"power cuts on {kind} are NOT tested here: {reason}")
    cuts, wrong = Cuts(kind, in_memory, has_volume).run(every)
    assert not wrong, "\n".join(wrong)
    assert cuts > 240 // every


@pytest.mark.parametrize("left_out", ["verify_partial", "commit_blob", "replace_file_unsynced", "replace_file"])
def test_power_cuts_are_effective_against_a_store_without_fsync(in_memory: Path, left_out: str) -> None:
    if reason := _can_mount("ext4"):
        pytest.skip(f"power cuts are NOT tested here: {reason}")
    _, wrong = Cuts("ext4", in_memory).run(10**9, left_out)
    assert wrong
