"""Messages that cross a process boundary, as msgspec structs.

Within v1 a struct only gains fields, each with a default; unknown fields are ignored. Sizes are bytes, times are
seconds since 1970, and names carry their unit. A docstring begins with the subject of its request, or ends with its
key or subject and the publisher; `make docs` renders all of them into docs/protocol.md.
"""

from typing import Any, TypeVar, dataclass_transform

import msgspec

from shoal_common.errors import BadMessage

T = TypeVar("T")
DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec.json.decode raises: also for bytes that are no UTF-8, and for what is nested too deep to skip."""


class _KeywordOnly(msgspec.StructMeta):
    # msgspec does not inherit `kw_only`. Without it a new field with a default could only ever come last.
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **config})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class WireStruct(msgspec.Struct, frozen=True, omit_defaults=True, metaclass=_KeywordOnly):
    """Base of every message: immutable, additive; fields that hold their default are not sent."""


def encode(message: object) -> bytes:
    """Encode a message as JSON."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """Decode JSON as a message of this kind. Raises BadMessage, which names the field and the problem."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except DECODE_ERRORS as e:
        raise BadMessage(f"not a {kind.__name__} message: {e}; see docs/protocol.md") from None
