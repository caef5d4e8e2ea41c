"""One libtorrent peer as a process, told what to do by lines on stdin: the anchor of `fanout.py`.

    python bench/torrent.py ADDRESS PORT
    > seed DIRECTORY TORRENT            make the torrent of what is in DIRECTORY and offer it
    > leech DIRECTORY TORRENT HOST:PORT …   fetch it, knowing these peers; says `done` when it is whole

Peers are known at once, as in a cluster; all else is as libtorrent comes, but for what only finds peers elsewhere.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import libtorrent as lt

PIECE_BYTES = 1 << 20
_LOOK_S = 0.02


def make_session(address: str, port: int) -> lt.session:
    """A peer that finds others only by being told."""
    return lt.session(
        {
            "listen_interfaces": f"{address}:{port}",
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            # uTP gives way to whatever else is on the link; ours is TCP as well.
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            # All nodes are behind one bridge.
            "allow_multiple_connections_per_ip": True,
            "alert_mask": 0,
        }
    )


def seed(session: lt.session, directory: Path, torrent: Path) -> None:
    """Offer what is in the directory. The torrent is there once this returns."""
    file = next(p for p in directory.iterdir() if p.is_file())
    made = lt.create_torrent(lt.list_files(str(file)), PIECE_BYTES, lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(directory))
    torrent.write_bytes(lt.bencode(made.generate()))
    wait_whole(add(session, directory, torrent))


def leech(session: lt.session, directory: Path, torrent: Path, peers: list[str]) -> None:
    """Fetch all of it; returns once it is whole."""
    directory.mkdir(parents=True, exist_ok=True)
    handle = add(session, directory, torrent)
    for peer in peers:
        host, _, port = peer.rpartition(":")
        handle.connect_peer((host, int(port)))
    wait_whole(handle)


def add(session: lt.session, directory: Path, torrent: Path) -> lt.torrent_handle:
    """Begin with a torrent, there or on its way."""
    parameters = lt.load_torrent_file(str(torrent))
    parameters.save_path = str(directory)
    return session.add_torrent(parameters)


def wait_whole(handle: lt.torrent_handle) -> None:
    """Return once all of it is there."""
    while not handle.status().is_seeding:
        time.sleep(_LOOK_S)


def main() -> None:
    """Do what is said, until stdin ends."""
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
