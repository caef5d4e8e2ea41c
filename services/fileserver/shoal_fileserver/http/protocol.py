"""What sending a file needs of an HTTP connection."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl


class FileConnection(Protocol):
    """A connection onto which files are sent past uvicorn's own buffers."""

    transport: asyncio.Transport
    flow: FlowControl
    threads: Executor
    """Send files: a disk may be slow."""
    sent_bytes: int
    """Bytes of files given to the socket or the transport."""

    @property
    def is_secured(self) -> bool:
        """Whether what is sent must be encrypted, and so goes through the transport."""
