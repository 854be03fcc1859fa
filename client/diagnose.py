"""Why a server cannot be reached: gRPC tells Python nothing of a failed handshake, so it is tried once more by hand."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from pathlib import Path

from propolis.link.certificates import Tls, fault_of

_TIMEOUT_S = 5.0
_CAUSES = (
    ("expired", "{who} certificate has expired"),
    ("not yet valid", "the server's certificate is not yet valid: is this machine's clock right?"),
    ("hostname mismatch", "the server's certificate is not for the name {host}: connect by a name that it has"),
    ("ip address mismatch", "the server's certificate is not for the address {host}: connect by a name that it has"),
    ("certificate verify failed", "the server's certificate is not of this federation's authority"),
    ("unknown ca", "the server does not know the authority of this device's certificate"),
    ("bad certificate", "the server refused this device's certificate"),
    ("certificate required", "the server got no certificate of this device"),
)


def why_unreachable(address: str, tls: Tls, now: float) -> str:
    """One line with the likely cause.

    Args:
        address: HOST:PORT.
        tls: the device's own, which is looked at first.
        now: seconds since 1970.
    """
    if (fault := fault_of(tls, now)) is not None:
        return fault
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as plain:
            return _shaken(plain, host, tls)
    except (OSError, ValueError, OverflowError) as error:
        return f"cannot connect to {address}: {getattr(error, 'strerror', None) or error or 'no answer'}"


def _shaken(plain: socket.socket, host: str, tls: Tls) -> str:
    context = ssl.create_default_context(cadata=tls.authority.decode())
    context.set_alpn_protocols(["h2"])
    _load_chain(context, tls)
    try:
        with context.wrap_socket(plain, server_hostname=host) as secure:
            answered = secure.read(1)  # in TLS 1.3 the server refuses a certificate after the handshake
    except ssl.SSLError as error:
        said = str(error).lower().replace("_", " ")
        who = "this device's" if "alert" in said else "the server's"
        for sign, cause in _CAUSES:
            if sign in said:
                return cause.format(host=host, who=who)
        return f"the handshake failed: {error.reason or error}"
    except OSError as error:
        return f"the server ended the handshake: {error.strerror or error}"
    if answered:
        return "the connection was lost; the server answers"
    return "the server ended the connection: by its clock or its authority, this device's certificate does not hold"


def _load_chain(context: ssl.SSLContext, tls: Tls) -> None:
    """Python's ssl reads keys from files only: a nameless place in memory where the system has one."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("propolis")
        try:
            os.write(descriptor, tls.private_key + tls.certificate)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.pem"
        path.touch(0o600)
        path.write_bytes(tls.private_key + tls.certificate)
        context.load_cert_chain(path)
