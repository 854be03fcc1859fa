"""Why a request for inference is not answered."""

from __future__ import annotations

from enum import Enum

from propolis.secure.errors import PropolisError


class Fault(Enum):
    """The kinds of reasons; the service gives each its gRPC status, the metrics their label."""

    UNKNOWN = "unknown"  # there is no such model or version
    INVALID = "invalid"  # the request does not fit the model
    BUSY = "busy"  # as many requests wait as may
    EXPIRED = "expired"  # the caller's deadline passed before it was its turn
    STOPPING = "stopping"  # the server takes no new requests
    FAILED = "failed"  # the model failed on these inputs


class InferenceError(PropolisError):
    """A request is not answered; the message is for the caller.

    Attributes:
        fault: of which kind.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
