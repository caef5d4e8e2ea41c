"""The gateway's own errors, in addition to those of shoal_common.

BadInput
└── UnsupportedParameter    an OpenAI parameter Shoal lacks    400
"""

from __future__ import annotations

from shoal_common.errors import BadInput


class UnsupportedParameter(BadInput):
    """A parameter of OpenAI's API that Shoal lacks: refused rather than ignored."""

    code = "unsupported_parameter"
