"""Where a server listens, as people write it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from propolis.secure.errors import UsageError

_NEVER_IN_A_HOST = frozenset(" /[]@")


@dataclass(frozen=True, slots=True)
class Address:
    """A host, without brackets, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, default_host: str = "") -> Self:
        """HOST:PORT, with an IPv6 address in brackets; ":PORT" where there is a default host.

        Raises:
            UsageError: it is none.
        """
        written, _, port = text.rpartition(":")
        in_brackets = written.startswith("[") and written.endswith("]")
        host = written.removeprefix("[").removesuffix("]") or default_host
        is_host = host and host.isprintable() and not _NEVER_IN_A_HOST & set(host)
        is_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 2**16
        if not is_host or not is_port or (":" in written and not in_brackets):
            raise UsageError(f"{text!r} is no address: expected HOST:PORT")
        return cls(host, int(port))

    def __str__(self) -> str:
        """HOST:PORT, as `parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
