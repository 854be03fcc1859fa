"""Users' own code by reference: ``MODULE:NAME``, from the installed packages and from the current folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from propolis.secure.errors import UsageError


def load_attribute(reference: str, what: str) -> Any:
    """What `reference` names, or None where its module has no such name.

    Args:
        reference: ``MODULE:NAME``.
        what: the kind of thing, for the messages: ``task``, ``app``.

    Raises:
        UsageError: the reference is malformed, or its module cannot be imported.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise UsageError(f"{what} '{reference}': expected MODULE:NAME")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), name, None)
    except (Exception, SystemExit) as error:  # the user's own code
        raise UsageError(f"{what} '{reference}': cannot import {module_name}: {error!s:.500}") from None
