"""A libtorrent peer as a process, controlled by lines on stdin: the baseline of `fanout.py`.

    python bench/libtorrent_peer.py ADDRESS PORT
    > seed DIRECTORY TORRENT            create the torrent of DIRECTORY and seed it
    > leech DIRECTORY TORRENT HOST:PORT …   download it from these peers; prints `done` at the end

Peers are known from the start, as in a cluster; settings are libtorrent's defaults, except for finding peers
elsewhere.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import libtorrent as lt

PIECE_BYTES = 1 << 20
_POLL_INTERVAL_S = 0.02


def make_session(address: str, port: int) -> lt.session:
    """Return a peer that does not search for others."""
    return lt.session(
        {
            "listen_interfaces": f"{address}:{port}",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            # uTP yields to other traffic on the link; Shoal uses TCP too.
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            # All nodes are behind one bridge.
            "allow_multiple_connections_per_ip": True,
            "alert_mask": 0,
        }
    )


def seed(session: lt.session, directory: Path, torrent: Path) -> None:
    """Seed a directory. The torrent exists when this returns."""
    file = next(p for p in directory.iterdir() if p.is_file())
    made = lt.create_torrent(lt.list_files(str(file)), PIECE_BYTES, lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(directory))
    torrent.write_bytes(lt.bencode(made.generate()))
    wait_whole(add(session, directory, torrent))


def leech(session: lt.session, directory: Path, torrent: Path, peers: list[str]) -> None:
    """Download everything; returns when it is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = add(session, directory, torrent)
    for peer in peers:
        host, _, port = peer.rpartition(":")
        handle.connect_peer((host, int(port)))
    wait_whole(handle)


def add(session: lt.session, directory: Path, torrent: Path) -> lt.torrent_handle:
    """Start a torrent, complete or to be downloaded."""
    parameters = lt.load_torrent_file(str(torrent))
    parameters.save_path = str(directory)
    return session.add_torrent(parameters)


def wait_whole(handle: lt.torrent_handle) -> None:
    """Return once it is complete."""
    while not handle.status().is_seeding:
        time.sleep(_POLL_INTERVAL_S)


def main() -> None:
    """Run commands until stdin ends."""
    session = make_session(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        verb, directory, torrent, *peers = line.split()
        if verb == "seed":
            seed(session, Path(directory), Path(torrent))
        else:
            leech(session, Path(directory), Path(torrent), peers)
        print("done", flush=True)


if __name__ == "__main__":
    main()
