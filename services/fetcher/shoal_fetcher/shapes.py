"""The shape of a model that no node has: from the hub's listing, config.json, and the headers of its weights.

Of each file with weights the hub sends the first 8 bytes and then the header, nothing of a tensor. What came is not
verified, so it is believed for nothing but how large the model is: a download takes none of it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from fnmatch import fnmatchcase

from shoal_common.errors import Corrupt, Expired, Unsupported
from shoal_common.messages.questions import ModelSize
from shoal_common.messages.records import Manifest, ManifestFile, ModelShape
from shoal_common.names import ModelRef
from shoal_common.pace import Pace
from shoal_common.shape import shape_of
from shoal_common.tensors import PREFIX_BYTES, Tensor, header_end, tensors_of
from shoal_fetcher.hub import Hub
from shoal_fetcher.restraint import Once

MOST_CONFIG_BYTES = 1 << 20
MOST_HEADER_BYTES = 16 << 20
"""Of one file: a hundred times what models have."""
_AT_ONCE = 4
_MOST_KEPT = 64
SHAPE_DEADLINE_S = 120.0


class Shapes:
    """Shapes by commit, the least lately asked forgotten first; a commit's never changes."""

    def __init__(self, hub: Hub, pace: Pace) -> None:
        self._hub, self._pace = hub, pace
        self._kept: OrderedDict[str, ModelShape] = OrderedDict()
        self._once = Once[ModelShape]()

    async def of(self, ref: ModelRef) -> ModelSize:
        """What a model's layers take. Raises what the hub's listing raises, Unsupported, Corrupt, or Expired."""
        manifest = await self._hub.resolve(ref)
        shape = self._kept.get(manifest.model)
        if shape is None:
            shape = await self._once(manifest.model, lambda: self._in_time(manifest))
        self._kept[manifest.model] = shape
        self._kept.move_to_end(manifest.model)
        while len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return ModelSize(model=manifest.model, size_bytes=manifest.size_bytes, shape=shape)

    async def _in_time(self, manifest: Manifest) -> ModelShape:
        try:
            async with asyncio.timeout(SHAPE_DEADLINE_S):
                return await self._read(manifest)
        except TimeoutError:
            raise Expired(
                f"the hub did not give the headers of {manifest.repo} within {SHAPE_DEADLINE_S:.0f} s; ask again"
            ) from None

    async def _read(self, manifest: Manifest) -> ModelShape:
        files = {file.path: file for file in manifest.files}
        weights = [file for path, file in sorted(files.items()) if fnmatchcase(path, "model*.safetensors")]
        if "config.json" not in files:
            raise Unsupported(f"{manifest.repo} has no config.json")
        if not weights:
            raise Unsupported(f"{manifest.repo} has no model*.safetensors files")
        config = await self._config(manifest, files["config.json"])
        found: dict[str, Tensor] = {}
        slots = asyncio.Semaphore(_AT_ONCE)

        async def add(file: ManifestFile) -> None:
            async with slots:
                found.update(await self._header(manifest, file))

        reading = [asyncio.ensure_future(add(file)) for file in weights]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
        return await asyncio.to_thread(shape_of, config, found)

    async def _config(self, manifest: Manifest, file: ManifestFile) -> dict[str, object]:
        if not 0 < file.size_bytes <= MOST_CONFIG_BYTES:
            raise Unsupported(f"the config.json of {manifest.repo} has {file.size_bytes} bytes")
        raw = await self._bytes(manifest, file, 0, file.size_bytes)
        try:
            return dict(json.loads(raw))
        except (ValueError, TypeError, RecursionError) as e:
            raise Corrupt(f"config.json of {manifest.repo} cannot be read: {e}") from None

    async def _header(self, manifest: Manifest, file: ManifestFile) -> dict[str, Tensor]:
        prefix = await self._bytes(manifest, file, 0, PREFIX_BYTES)
        end = header_end(prefix, file.path)
        if end > min(file.size_bytes, MOST_HEADER_BYTES):
            raise Corrupt(f"the safetensors header of {file.path} is said to end at byte {end}")
        header = prefix + await self._bytes(manifest, file, PREFIX_BYTES, end)
        return await asyncio.to_thread(tensors_of, header, file.path)

    async def _bytes(self, manifest: Manifest, file: ManifestFile, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; a hub that sends others, or fewer, is Corrupt."""
        found = bytearray()
        async with self._hub.read(manifest, file, start, end) as body:
            skip = start - body.begin  # a server that ignores Range begins at 0
            async for chunk in body.chunks:
                await self._pace.take(len(chunk))
                found += chunk
                if len(found) >= skip + end - start:
                    break
        if len(found) < skip + end - start:
            raise Corrupt(f"the hub sent {len(found)} bytes of {file.path} where {end - start} were asked for")
        return bytes(found[skip : skip + end - start])
