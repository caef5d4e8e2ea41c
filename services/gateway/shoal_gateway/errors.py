"""The gateway's own errors, in addition to those of shoal_common.

BadInput
├── TooLarge                a body beyond the limit            413
└── UnsupportedParameter    an OpenAI parameter Shoal lacks    400
Denied
└── CrossOriginForbidden    a web page of another site         403
"""

from __future__ import annotations

from shoal_common.errors import BadInput, Denied


class TooLarge(BadInput):
    """A request larger than the gateway, or NATS behind it, accepts."""

    code = "too_large"
    http_status = 413


class UnsupportedParameter(BadInput):
    """A parameter of OpenAI's API that Shoal lacks: refused rather than ignored."""

    code = "unsupported_parameter"


class CrossOriginForbidden(Denied):
    """A web page of another site tries to use this node through its visitor's browser."""

    code = "cross_origin"
    http_status = 403
