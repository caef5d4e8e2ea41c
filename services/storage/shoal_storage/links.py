"""What the store holds of adopted models: where their blobs are, views that lead there, and what was hashed.

Blocking: for threads. All of it is in the store, none of it in a root, and all of it can be made again from the root;
only `adopted/verified.json`, which saves hashing, is made durable. A view is links and nothing else: a hard link
would change a file of the root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from shoal_common.blobs import AdoptedBlob
from shoal_common.errors import BadMessage, BadName
from shoal_common.layout import Layout, model_of
from shoal_common.logs import Log
from shoal_common.messages import Message, decode, encode
from shoal_storage.adopt import Verified
from shoal_storage.adopted import Adopted, File
from shoal_storage.durable import write_file

log = Log("adoption")


class _Memory(Message):
    files: dict[str, Verified] = {}


def read_verified(layout: Layout) -> dict[str, Verified]:
    """What was hashed before, by absolute path. What cannot be read is hashed again."""
    try:
        return decode(layout.verified.read_bytes(), _Memory).files
    except FileNotFoundError:
        return {}
    except (BadMessage, OSError) as e:
        log.warning("what was hashed is not known any more; it is hashed again", why=str(e))
        return {}


def write_verified(layout: Layout, verified: Mapping[str, Verified]) -> None:
    """Remember what was hashed, durably. A disk that cannot take it costs the next start the hashing, and no more."""
    path = layout.verified
    try:
        path.parent.mkdir(exist_ok=True)
        write_file(path, encode(_Memory(files=dict(verified))))
    except OSError as e:
        log.warning("what was hashed could not be written down; the next start hashes it again", why=e.strerror)


def point(layout: Layout, changed: Mapping[str, File], all_of: Collection[str]) -> None:
    """Say where the bytes of some blobs are, and of no blob that is not in `all_of`."""
    for path in layout.adopted_blobs.glob("*/*"):
        if path.name not in all_of:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others are there
                path.parent.rmdir()
    for sha256, file in changed.items():
        path, seen = layout.adopted_blob(sha256), file.seen
        data = encode(AdoptedBlob(path=file.at, size_bytes=seen.size_bytes, mtime_ns=seen.mtime_ns, inode=seen.inode))
        with suppress(FileNotFoundError):
            if path.read_bytes() == data:
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_bytes(data)
        fresh.replace(path)


def note(layout: Layout, model: str) -> bool:
    """Note that a model is adopted: before its view, which a start would remove. Returns whether that is news."""
    repo, _, commit = model.rpartition("@")
    marker = layout.adopted_model(repo, commit)
    news = not marker.exists()
    if news:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return news


def show(layout: Layout, adopted: Adopted) -> None:
    """Make the view of an adopted model."""
    manifest = adopted.manifest
    view = layout.view(manifest.repo, manifest.commit)
    wanted = {str(layout.view_file(manifest, f.path)): adopted.files[f.path].at for f in manifest.files}
    if _links_below(view) != wanted:
        _remove_view(layout, manifest.repo, manifest.commit)
        for link, target in wanted.items():
            Path(link).parent.mkdir(parents=True, exist_ok=True)
            Path(link).symlink_to(target)


def _links_below(view: Path) -> dict[str, str]:
    found = {}
    for path in view.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            found[str(path)] = str(path.readlink()) if path.is_symlink() else ""
    return found


def hide(layout: Layout, model: str, with_view: bool) -> None:
    """A model is adopted no more. Its view stays when the store has the model itself."""
    repo, _, commit = model.rpartition("@")
    if with_view:
        _remove_view(layout, repo, commit)
    layout.adopted_model(repo, commit).unlink(missing_ok=True)


def _remove_view(layout: Layout, repo: str, commit: str) -> None:
    view = layout.view(repo, commit)
    tomb = layout.tombs / f"{os.urandom(6).hex()}-{commit}"
    with suppress(FileNotFoundError):
        view.replace(tomb)
        shutil.rmtree(tomb)
    with suppress(OSError):  # another commit of the model lives there
        view.parent.rmdir()


def noted(layout: Layout) -> list[str]:
    """The models (`org/name@commit`) that were noted as adopted."""
    found = []
    with suppress(FileNotFoundError):
        for path in layout.adopted_models.iterdir():
            name, _, commit = path.name.rpartition("@")
            with suppress(BadName):
                found.append(model_of(name, commit))
    return found
