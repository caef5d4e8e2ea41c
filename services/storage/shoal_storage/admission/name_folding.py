"""Which names a file system takes for one: by case (macOS, Windows), by Unicode's forms (macOS), or none. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import msgspec


class NameFolding(msgspec.Struct, frozen=True):
    """What a file system ignores in names."""

    case: bool = False
    forms: bool = False
    """Whether a letter is the same composed (NFC) and decomposed (NFD)."""

    def fold(self, path: str) -> str:
        """Return the same text for all paths that are one file."""
        if self.forms or self.case:
            path = unicodedata.normalize("NFC", path)
        return unicodedata.normalize("NFC", path.casefold()) if self.case else path

    def clash(self, paths: Iterable[str]) -> tuple[str, str] | None:
        """Return two paths that cannot be in one directory tree: they are one file, or a file and a directory."""
        files: dict[str, str] = {}
        for path in sorted(paths):
            other = files.setdefault(self.fold(path), path)
            if other != path:
                return other, path
        for path in files.values():
            parts = path.split("/")
            for end in range(1, len(parts)):
                if other_file := files.get(self.fold("/".join(parts[:end]))):
                    return other_file, path
        return None
