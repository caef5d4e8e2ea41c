"""The shape of a model that no node has: from the hub's listing, config.json, and the headers of its weights.

Of each weight file only the first 8 bytes and the header are read. They are not verified, so they are used only for
the model's size: a download takes nothing of them.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from fnmatch import fnmatchcase

from shoal_common.concurrency.single_flight import SingleFlight
from shoal_common.errors import Corrupt, Expired, Unsupported
from shoal_common.host.rate_limiter import RateLimiter
from shoal_common.messages.manifest import Manifest, ManifestFile
from shoal_common.messages.model_shape import GetModelShape, ModelShape, ModelSize
from shoal_common.models.model_shape import parse_model_shape
from shoal_common.models.safetensors_header import PREFIX_BYTES, Tensor, header_end, parse_tensors
from shoal_common.names import ModelRef
from shoal_fetcher.hub.client import HubClient

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
"""Of one file: a hundred times what models have."""
MAX_HEADERS_BYTES = 64 << 20
"""Of all files: five times what the largest models have, with 100,000 tensors."""
_MAX_CONCURRENT_HEADERS = 4
_MAX_CACHED = 64
SHAPE_DEADLINE_S = 120.0


class ModelShapes:
    """LRU cache of shapes by commit, whose shape never changes."""

    def __init__(self, hub: HubClient, limiter: RateLimiter) -> None:
        self._hub, self._limiter = hub, limiter
        self._shapes: OrderedDict[str, ModelShape] = OrderedDict()
        self._single_flight = SingleFlight[ModelShape]()

    async def shape(self, request: GetModelShape) -> ModelSize:
        """Return the size of each layer of a model that may be on no node."""
        return await self.size_of(ModelRef.parse(request.model))

    async def size_of(self, ref: ModelRef) -> ModelSize:
        """Return the size of a model's layers. Raises Unsupported, Corrupt, Expired, and what listing it raises."""
        manifest = await self._hub.resolve(ref)
        shape = self._shapes.get(manifest.model)
        if shape is None:
            shape = await self._single_flight(manifest.model, lambda: self._read_with_timeout(manifest))
        self._shapes[manifest.model] = shape
        self._shapes.move_to_end(manifest.model)
        while len(self._shapes) > _MAX_CACHED:
            self._shapes.popitem(last=False)
        return ModelSize(model=manifest.model, size_bytes=manifest.size_bytes, shape=shape)

    async def _read_with_timeout(self, manifest: Manifest) -> ModelShape:
        try:
            async with asyncio.timeout(SHAPE_DEADLINE_S):
                return await self._read(manifest)
        except TimeoutError:
            raise Expired(
                f"the hub did not send the headers of {manifest.repo} within {SHAPE_DEADLINE_S:.0f} s; try again"
            ) from None

    async def _read(self, manifest: Manifest) -> ModelShape:
        files = {file.path: file for file in manifest.files}
        weights = [file for path, file in sorted(files.items()) if fnmatchcase(path, "model*.safetensors")]
        if "config.json" not in files:
            raise Unsupported(f"{manifest.repo} has no config.json")
        if not weights:
            raise Unsupported(f"{manifest.repo} has no model*.safetensors files")
        config = await self._config(manifest, files["config.json"])
        tensors: dict[str, Tensor] = {}
        slots, read_bytes = asyncio.Semaphore(_MAX_CONCURRENT_HEADERS), 0

        async def add(file: ManifestFile) -> None:
            nonlocal read_bytes
            async with slots:
                header = await self._header(manifest, file)
                read_bytes += len(header)
                if read_bytes > MAX_HEADERS_BYTES:
                    raise Unsupported(f"the headers of {manifest.repo} have more than {MAX_HEADERS_BYTES >> 20} MiB")
                tensors.update(await asyncio.to_thread(parse_tensors, header, file.path))

        reading = [asyncio.ensure_future(add(file)) for file in weights]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
        return await asyncio.to_thread(parse_model_shape, config, tensors)

    async def _config(self, manifest: Manifest, file: ManifestFile) -> dict[str, object]:
        if not 0 < file.size_bytes <= MAX_CONFIG_BYTES:
            raise Unsupported(
                f"the config.json of {manifest.repo} has {file.size_bytes} bytes, not 1 to {MAX_CONFIG_BYTES}"
            )
        raw = await self._read_bytes(manifest, file, 0, file.size_bytes)
        try:
            return dict(json.loads(raw))
        except (ValueError, TypeError, RecursionError) as e:
            raise Corrupt(f"config.json of {manifest.repo} is not a JSON object: {e}") from None

    async def _header(self, manifest: Manifest, file: ManifestFile) -> bytes:
        prefix = await self._read_bytes(manifest, file, 0, PREFIX_BYTES)
        end = header_end(prefix, file.path)
        if end > min(file.size_bytes, MAX_HEADER_BYTES):
            raise Corrupt(f"the safetensors header of {file.path} claims to end at byte {end}")
        return prefix + await self._read_bytes(manifest, file, PREFIX_BYTES, end)

    async def _read_bytes(self, manifest: Manifest, file: ManifestFile, start: int, end: int) -> bytes:
        """Return bytes [start, end) of a file. Raises Corrupt if the hub sends fewer."""
        received = bytearray()
        async with self._hub.read(manifest, file, start, end) as body:
            skip = start - body.offset  # a server that ignores Range sends from 0
            async for chunk in body.chunks:
                await self._limiter.acquire(len(chunk))
                received += chunk
                if len(received) >= skip + end - start:
                    break
        if len(received) < skip + end - start:
            raise Corrupt(f"the hub sent {len(received)} of {end - start} bytes of {file.path}")
        return bytes(received[skip : skip + end - start])
