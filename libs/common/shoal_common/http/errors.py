"""Errors that only HTTP has.

BadInput
├── HeadTooLarge            a request's head beyond the limit       431
└── TooLarge                a body beyond the limit                 413
Denied
└── CrossOriginForbidden    a web page of another site              403
Expired
└── BodyTooSlow             a body below the minimum rate           408
"""

from __future__ import annotations

from shoal_common.errors import BadInput, Denied, Expired


class HeadTooLarge(BadInput):
    """A request whose head is too long, or has too many headers."""

    code = "head_too_large"
    http_status = 431


class TooLarge(BadInput):
    """A request larger than the server, or NATS behind it, accepts."""

    code = "too_large"
    http_status = 413


class CrossOriginForbidden(Denied):
    """A web page of another site tries to use this node through its visitor's browser."""

    code = "cross_origin"
    http_status = 403


class BodyTooSlow(Expired):
    """A request whose body arrives below the minimum rate."""

    code = "body_too_slow"
    http_status = 408
