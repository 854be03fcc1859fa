from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Signed(_message.Message):
    __slots__ = ("payload", "signature")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    signature: bytes
    def __init__(self, payload: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Invitation(_message.Message):
    __slots__ = ("version", "federation", "index", "name", "public_key", "not_after", "root_online")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    ROOT_ONLINE_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    index: int
    name: str
    public_key: bytes
    not_after: int
    root_online: bool
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., index: _Optional[int] = ..., name: _Optional[str] = ..., public_key: _Optional[bytes] = ..., not_after: _Optional[int] = ..., root_online: bool = ...) -> None: ...

class Descriptor(_message.Message):
    __slots__ = ("version", "federation", "index", "signing_key", "hpke_key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
    HPKE_KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    index: int
    signing_key: bytes
    hpke_key: bytes
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., index: _Optional[int] = ..., signing_key: _Optional[bytes] = ..., hpke_key: _Optional[bytes] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("version", "federation", "number", "not_after", "entries", "revoked_releases")
    class Entry(_message.Message):
        __slots__ = ("name", "public_key", "revoked")
        NAME_FIELD_NUMBER: _ClassVar[int]
        PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
        REVOKED_FIELD_NUMBER: _ClassVar[int]
        name: str
        public_key: bytes
        revoked: bool
        def __init__(self, name: _Optional[str] = ..., public_key: _Optional[bytes] = ..., revoked: bool = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    REVOKED_RELEASES_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    number: int
    not_after: int
    entries: _containers.RepeatedCompositeFieldContainer[Roster.Entry]
    revoked_releases: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., number: _Optional[int] = ..., not_after: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[Roster.Entry, _Mapping]]] = ..., revoked_releases: _Optional[_Iterable[int]] = ...) -> None: ...

class Prekey(_message.Message):
    __slots__ = ("number", "public_key")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    number: int
    public_key: bytes
    def __init__(self, number: _Optional[int] = ..., public_key: _Optional[bytes] = ...) -> None: ...
