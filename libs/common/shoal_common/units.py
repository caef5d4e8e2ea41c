"""Numbers for people."""

from __future__ import annotations


def format_bytes(size_bytes: int) -> str:
    """Format bytes for people, in decimal units as disks are sold."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{size_bytes} B"
        value /= 1000
    return f"{value:.4g} TB"
