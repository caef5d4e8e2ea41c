"""Which port a service listens on: the one that was set, the one chosen before, the usual one, any."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_common.errors import Unavailable
from shoal_common.host.listening import has_address, listen, missing_address
from shoal_common.settings.node import PortSettings
from shoal_common.settings.ports import chosen_port, fileserver_ports, port_ranges, ports_to_try, stage_ports

NOT_HERE = "203.0.113.7"
"""Of documentation (RFC 5737)."""


def test_a_port_that_was_set_is_the_only_one() -> None:
    assert ports_to_try(9, chosen=7, default=8) == [9]
    assert stage_ports(PortSettings(stage_port=9)) == list(range(9, 25))
    assert fileserver_ports(PortSettings(fileserver_port=9), {"chosen": {"fileserver_port": 7}}) == [9]


def test_the_chosen_port_comes_before_the_usual_one() -> None:
    assert fileserver_ports(PortSettings(), {"chosen": {"fileserver_port": 7}}) == [7, 8081, 0]
    assert fileserver_ports(PortSettings(), {}) == [8081, 0]
    assert ports_to_try(0, chosen=7, default=8) == [7, 0]
    assert stage_ports(PortSettings()) == [*range(8082, 8098), 0]
    assert stage_ports(PortSettings(stage_port=0)) == [0]


@pytest.mark.parametrize("wrong", [{}, {"chosen": 5}, {"chosen": {"p": "7"}}, {"chosen": {"p": 70000}}])
def test_a_chosen_port_that_is_none_counts_as_absent(wrong: dict[str, object]) -> None:
    assert chosen_port(wrong, "p") == 0


@given(ports=st.lists(st.integers(1, 65535), max_size=30))
def test_ranges_for_a_firewall_name_each_port_once(ports: list[int]) -> None:
    bounds = [part.split("-") for part in port_ranges(ports).split(", ") if part]
    named = [port for first, *last in bounds for port in range(int(first), int(last[0] if last else first) + 1)]
    assert named == sorted(set(ports))


def test_the_block_is_one_range() -> None:
    assert port_ranges([4222, 8080, 8081, *stage_ports(PortSettings())]) == "4222, 8080-8097"


def test_a_taken_port_falls_back_and_a_set_one_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = holder.getsockname()[1]
        with listen("127.0.0.1", [taken, 0], "the test", "do that") as found:
            assert found.getsockname()[1] != taken
        with pytest.raises(
            Unavailable, match=rf"the test cannot listen on 127.0.0.1 port {taken} .*pid \d+.*do that"
        ):
            listen("127.0.0.1", [taken], "the test", "do that")


def test_an_address_of_another_machine_blames_no_process() -> None:
    assert has_address("127.0.0.1") and not has_address(NOT_HERE)
    assert "it has " in missing_address(NOT_HERE) and "127.0.0.1" in missing_address(NOT_HERE)
    with pytest.raises(Unavailable, match=f"this machine does not have the address {NOT_HERE}") as refused:
        listen(NOT_HERE, [8081, 0], "the test", "stop that program")
    assert "program" not in refused.value.message
