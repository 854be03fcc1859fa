from propolis.protos import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Published(_message.Message):
    __slots__ = ("version", "holder", "statement", "material")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    MATERIAL_FIELD_NUMBER: _ClassVar[int]
    version: int
    holder: _identity_pb2.Signed
    statement: _identity_pb2.Signed
    material: bytes
    def __init__(self, version: _Optional[int] = ..., holder: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., statement: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., material: _Optional[bytes] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("index", "descriptor")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    index: int
    descriptor: bytes
    def __init__(self, index: _Optional[int] = ..., descriptor: _Optional[bytes] = ...) -> None: ...

class HeldKey(_message.Message):
    __slots__ = ("version", "number", "published", "mac_key", "secret_key", "roster", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    MAC_KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_KEY_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    number: int
    published: Published
    mac_key: bytes
    secret_key: bytes
    roster: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, version: _Optional[int] = ..., number: _Optional[int] = ..., published: _Optional[_Union[Published, _Mapping]] = ..., mac_key: _Optional[bytes] = ..., secret_key: _Optional[bytes] = ..., roster: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class FormerKeys(_message.Message):
    __slots__ = ("version", "bundles")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    version: int
    bundles: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, version: _Optional[int] = ..., bundles: _Optional[_Iterable[bytes]] = ...) -> None: ...
