"""The gateway's own errors, beside those of shoal_common.

BadInput
├── TooLarge                a body past the limit              413
└── UnsupportedParameter    an OpenAI parameter we lack        400
Denied
└── ForeignPage             a web page from elsewhere          403
"""

from __future__ import annotations

from shoal_common.errors import BadInput, Denied


class TooLarge(BadInput):
    """A request past what the gateway, or NATS behind it, carries."""

    code = "too_large"
    http_status = 413


class UnsupportedParameter(BadInput):
    """A parameter of OpenAI's API that Shoal would have to ignore: refused instead."""

    code = "unsupported_parameter"


class ForeignPage(Denied):
    """A web page from elsewhere wants to use this node through somebody's browser."""

    code = "foreign_page"
    http_status = 403
