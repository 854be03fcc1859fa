"""How gRPC is set up at both ends of the link."""

from __future__ import annotations

import grpc

from propolis.link.certificates import Tls
from propolis.link.enrolment import UNCOMPRESSED
from propolis.link.frames import LARGEST_FRAME
from propolis.secure.errors import UsageError

_PING_S, _PING_TIMEOUT_S, _HANDSHAKE_S, _IDLE_S = 30, 20, 10, 60

# A frame and what protobuf puts around it; longer messages are refused before memory is taken.
_COMMON = [
    ("grpc.max_receive_message_length", LARGEST_FRAME),
    ("grpc.max_send_message_length", LARGEST_FRAME),
    # A frame is as large as it looks: gRPC would inflate a compressed one before it measures it.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    UNCOMPRESSED,
    # It grows the buffers of every connection to four times what a thousand idle devices may cost.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", _PING_S * 1000),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.optimization_target", "throughput"),
]

SERVICE, METHOD = "propolis.link.v1.Link", "Connect"
METHOD_PATH = f"/{SERVICE}/{METHOD}"

SERVER_OPTIONS = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # a port in use is an error
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_S * 1000),
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_S * 1000 // 2),
    ("grpc.max_connection_idle_ms", _IDLE_S * 1000),  # without a stream: a device that is not let in
    ("grpc.max_concurrent_streams", 8),  # a device needs one, and one that takes its place
]

DEVICE_OPTIONS = [
    *_COMMON,
    ("grpc.use_local_subchannel_pool", 1),  # devices of one process have a connection each
    ("grpc.keepalive_permit_without_calls", 1),
]


def credentials_of(tls: Tls) -> grpc.ChannelCredentials:
    """What a device shows to the server, and whom it trusts to be it."""
    return grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)


def listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Let a server listen on HOST:PORT, without TLS where there are no credentials; the port.

    Raises:
        UsageError: the address cannot be listened on.
    """
    try:
        return int(server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address))
    except RuntimeError:
        raise UsageError(
            f"cannot listen on {address}: another process may have it, or it is not this machine's; name a free one"
        ) from None
