"""The units and agents in deploy/."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_common.names import SERVICES
from tests.harness.process import checked_run

DEPLOY = Path(__file__).parents[3] / "deploy"
UNITS = DEPLOY / "systemd"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_systemd_accepts_the_units_without_warnings(tmp_path: Path) -> None:
    binaries = tmp_path / ".local/share/shoal/venv/bin"
    binaries.mkdir(parents=True)
    for name in ("python", "shoal"):
        (binaries / name).symlink_to("/bin/true")
    run_directory = tmp_path / "run"
    run_directory.mkdir(mode=0o700)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", *map(str, sorted(UNITS.iterdir()))],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(run_directory)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # It exits with 0 on a misspelt setting.
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_every_service_has_a_unit_with_watchdog_and_restart() -> None:
    target = (UNITS / "shoal.target").read_text()
    assert {p.stem for p in UNITS.glob("*.service")} == {f"shoal-{s}" for s in (*SERVICES, "nats")}
    for service in SERVICES:
        unit = (UNITS / f"shoal-{service}.service").read_text()
        for line in ("Type=notify", "WatchdogSec=30", "Restart=always", "PartOf=shoal.target"):
            assert f"\n{line}\n" in unit
        assert f"-m shoal_{service}\n" in unit
        assert f"shoal-{service}.service" in target


def test_I12_only_the_fetchers_unit_reads_the_hubs_token() -> None:
    reading = {p.name for p in UNITS.iterdir() if "environment.fetcher" in p.read_text()}
    assert reading == {"shoal-fetcher.service"}


@pytest.mark.parametrize("per_service", [False, True])
def test_launchd_keeps_agents_and_only_the_fetcher_has_hf_token(tmp_path: Path, per_service: bool) -> None:
    command = [sys.executable, str(DEPLOY / "launchd" / "make_plists.py"), "--venv", "/v", "--home", str(tmp_path)]
    command += ["--into", str(tmp_path / "agents"), "--env", "HF_TOKEN=hf_x", "--env", "SHOAL_BIND=0.0.0.0"]
    checked_run(*command, *["--per-service"] * per_service, timeout_s=30)
    found = {p.name: plistlib.loads(p.read_bytes()) for p in (tmp_path / "agents").iterdir()}
    names = {"nats", *SERVICES} if per_service else {"node"}
    assert set(found) == {f"org.shoal.{n}.plist" for n in names}
    for file, plist in found.items():
        assert file == f"{plist['Label']}.plist"
        assert plist["KeepAlive"] is True and plist["RunAtLoad"] is True
        assert plist["EnvironmentVariables"]["SHOAL_HOME"] == str(tmp_path)
    if per_service:
        holders = {p["Label"] for p in found.values() if "HF_TOKEN" in p["EnvironmentVariables"]}
        assert holders == {"org.shoal.fetcher"}
