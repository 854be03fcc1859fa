from propolis.protos import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Token(_message.Message):
    __slots__ = ("version", "invitation", "private_key", "root_key", "authority")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_KEY_FIELD_NUMBER: _ClassVar[int]
    ROOT_KEY_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    version: int
    invitation: _identity_pb2.Signed
    private_key: bytes
    root_key: bytes
    authority: bytes
    def __init__(self, version: _Optional[int] = ..., invitation: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., private_key: _Optional[bytes] = ..., root_key: _Optional[bytes] = ..., authority: _Optional[bytes] = ...) -> None: ...

class AuthorityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuthorityReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    def __init__(self, certificate: _Optional[bytes] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("version", "invitation", "descriptor", "signing_request", "clock", "proof", "announcement")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    invitation: _identity_pb2.Signed
    descriptor: _identity_pb2.Signed
    signing_request: bytes
    clock: int
    proof: bytes
    announcement: _identity_pb2.Signed
    def __init__(self, version: _Optional[int] = ..., invitation: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., descriptor: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., signing_request: _Optional[bytes] = ..., clock: _Optional[int] = ..., proof: _Optional[bytes] = ..., announcement: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("version", "certificate", "roster", "link_address")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    version: int
    certificate: bytes
    roster: _identity_pb2.Signed
    link_address: str
    def __init__(self, version: _Optional[int] = ..., certificate: _Optional[bytes] = ..., roster: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., link_address: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("hello", "welcome", "begin", "chunk", "received", "beat", "cancel", "free", "farewell", "news")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    FAREWELL_FIELD_NUMBER: _ClassVar[int]
    NEWS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    begin: Begin
    chunk: Chunk
    received: Received
    beat: Beat
    cancel: Cancel
    free: Free
    farewell: Farewell
    news: News
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., free: _Optional[_Union[Free, _Mapping]] = ..., farewell: _Optional[_Union[Farewell, _Mapping]] = ..., news: _Optional[_Union[News, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "process", "node_id", "clock", "server", "have")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    version: int
    process: bytes
    node_id: int
    clock: int
    server: bytes
    have: _containers.RepeatedCompositeFieldContainer[Progress]
    def __init__(self, version: _Optional[int] = ..., process: _Optional[bytes] = ..., node_id: _Optional[int] = ..., clock: _Optional[int] = ..., server: _Optional[bytes] = ..., have: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("version", "process", "beat_seconds", "largest_message", "run_id", "run_config", "have")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    BEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    version: int
    process: bytes
    beat_seconds: int
    largest_message: int
    run_id: int
    run_config: bytes
    have: _containers.RepeatedCompositeFieldContainer[Progress]
    def __init__(self, version: _Optional[int] = ..., process: _Optional[bytes] = ..., beat_seconds: _Optional[int] = ..., largest_message: _Optional[int] = ..., run_id: _Optional[int] = ..., run_config: _Optional[bytes] = ..., have: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("id", "size", "whole")
    ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    size: int
    whole: bool
    def __init__(self, id: _Optional[bytes] = ..., size: _Optional[int] = ..., whole: bool = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("id", "header", "parts", "offset", "data")
    ID_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    header: int
    parts: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    data: bytes
    def __init__(self, id: _Optional[bytes] = ..., header: _Optional[int] = ..., parts: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: _Optional[bytes] = ...) -> None: ...

class Free(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    def __init__(self, id: _Optional[bytes] = ...) -> None: ...

class News(_message.Message):
    __slots__ = ("spread_ms",)
    SPREAD_MS_FIELD_NUMBER: _ClassVar[int]
    spread_ms: int
    def __init__(self, spread_ms: _Optional[int] = ...) -> None: ...

class Farewell(_message.Message):
    __slots__ = ("reason", "detail")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Farewell.Reason]
        RUN_OVER: _ClassVar[Farewell.Reason]
        SHUTDOWN: _ClassVar[Farewell.Reason]
        REPLACED: _ClassVar[Farewell.Reason]
        IDENTITY: _ClassVar[Farewell.Reason]
        CLOCK: _ClassVar[Farewell.Reason]
        PROTOCOL: _ClassVar[Farewell.Reason]
        TOO_LARGE: _ClassVar[Farewell.Reason]
        SILENT: _ClassVar[Farewell.Reason]
        VERSION: _ClassVar[Farewell.Reason]
        UNSURE: _ClassVar[Farewell.Reason]
    UNSPECIFIED: Farewell.Reason
    RUN_OVER: Farewell.Reason
    SHUTDOWN: Farewell.Reason
    REPLACED: Farewell.Reason
    IDENTITY: Farewell.Reason
    CLOCK: Farewell.Reason
    PROTOCOL: Farewell.Reason
    TOO_LARGE: Farewell.Reason
    SILENT: Farewell.Reason
    VERSION: Farewell.Reason
    UNSURE: Farewell.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: Farewell.Reason
    detail: str
    def __init__(self, reason: _Optional[_Union[Farewell.Reason, str]] = ..., detail: _Optional[str] = ...) -> None: ...
