"""Which ports this node's services listen on: those that were set, that were chosen once, or the defaults. Pure.

A port that was set is used or refused. Otherwise the first that is free of those to try; what is found by trying is
kept in `[chosen]` of node.toml, so that it stays the same after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal_common.settings.node import FILESERVER_PORT, STAGE_PORT, STAGE_PORT_COUNT, PortSettings

CHOSEN_SECTION = "chosen"
"""Of node.toml: ports that were free when one was looked for, by the key of their setting."""


def chosen_port(file: Mapping[str, object], key: str) -> int:
    """Return the port that was chosen once for a setting; 0 if none was."""
    section = file.get(CHOSEN_SECTION)
    port = section.get(key) if isinstance(section, Mapping) else None
    return port if isinstance(port, int) and 0 < port < 65536 else 0


def ports_to_try(port: int | None, chosen: int, default: int = 0) -> list[int]:
    """Return the ports to try in turn, 0 standing for any free one. `port` is the setting; None: not set."""
    if port:
        return [port]
    wanted = [chosen, default if port is None else 0]
    return [*dict.fromkeys(p for p in wanted if p), 0]


def fileserver_ports(settings: PortSettings, file: Mapping[str, object]) -> list[int]:
    """Return the ports for the fileserver to try."""
    return ports_to_try(settings.fileserver_port, chosen_port(file, "fileserver_port"), FILESERVER_PORT)


def stage_ports(settings: PortSettings) -> list[int]:
    """Return the ports for a stage to try."""
    first = STAGE_PORT if settings.stage_port is None else settings.stage_port
    block = list(range(first, first + STAGE_PORT_COUNT)) if first else []
    return block if settings.stage_port else [*block, 0]


def port_ranges(ports: Iterable[int]) -> str:
    """Return ports as a firewall takes them, like `4222, 8080-8097`. Leaves out 0."""
    runs: list[list[int]] = []
    for port in sorted(set(ports) - {0}):
        if runs and port == runs[-1][-1] + 1:
            runs[-1].append(port)
        else:
            runs.append([port])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
