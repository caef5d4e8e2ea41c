"""Every verb and route of the code is on the pages that list them, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from scripts.protocol_fields import SERVICES, Endpoint, all_messages, endpoints
from shoal_common.messages.downloads import DownloadPhase
from shoal_common.messages.instances import InstancePhase, StagePhase
from shoal_gateway.app import ROUTES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def answered() -> list[Endpoint]:
    return list(endpoints(all_messages()))


def test_the_commands_table_lists_every_command() -> None:
    listed = re.findall(r"^\| `…(\.\S+)` \|", section("Commands"), re.MULTILINE)
    assert sorted(f"cmd{subject}" for subject in listed) == sorted(
        e.subject for e in answered() if e.subject.startswith("cmd.")
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_services_page_names_every_verb_that_it_answers(service: str) -> None:
    page = (ROOT / "services" / service / "README.md").read_text()
    verbs = {e.subject.rpartition(".")[2] for e in answered() if e.service == service}
    assert verbs and not {verb for verb in verbs if not re.search(rf"`[^`\n]*\.{verb}`", page)}


def test_the_rest_table_lists_every_route() -> None:
    listed = set(re.findall(r"^\| `(\w+) (\S+)` \|", section("REST"), re.MULTILINE))
    assert listed == {(method, r.path) for r in ROUTES for method in r.methods or () if method != "HEAD"}


def test_the_page_lists_every_phase() -> None:
    line = re.findall(r"^Phases: .*$", PAGE, re.MULTILINE)[0]
    of_downloads, of_stages, of_instances = line.split("; ")
    for text, phases in ((of_downloads, DownloadPhase), (of_stages, StagePhase), (of_instances, InstancePhase)):
        listed = " ".join(re.findall(r"`([a-z ]+)`", text)).split()
        assert sorted(listed) == sorted(get_args(phases))
