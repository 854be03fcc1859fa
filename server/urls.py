"""URLs as they may be shown."""

from __future__ import annotations

import re

# The name before a colon stays away with what follows: a secret may hold any sign but a space, the one before @ last.
_CREDENTIALS = re.compile(r"(\w://)[^\s:/@]*:[^\s]*@")
_VALUE = re.compile(r"([?&][^=&\s]*=)[^&\s]*")


def without_secrets(text: str) -> str:
    """A URL, or a text with URLs in it, without names and passwords before the host and without values of a query."""
    return _VALUE.sub(r"\1***", _CREDENTIALS.sub(r"\1", text))
