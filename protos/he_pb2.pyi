from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Holder(_message.Message):
    __slots__ = ("version", "federation", "serial", "public_key", "not_before", "not_after")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    serial: int
    public_key: bytes
    not_before: int
    not_after: int
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., serial: _Optional[int] = ..., public_key: _Optional[bytes] = ..., not_before: _Optional[int] = ..., not_after: _Optional[int] = ...) -> None: ...

class Statement(_message.Message):
    __slots__ = ("version", "federation", "number", "key_id")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    number: int
    key_id: bytes
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., number: _Optional[int] = ..., key_id: _Optional[bytes] = ...) -> None: ...

class Material(_message.Message):
    __slots__ = ("version", "clients", "value_bits", "seeded", "parameters", "public_key", "secret_commitment")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    VALUE_BITS_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    clients: int
    value_bits: int
    seeded: bool
    parameters: bytes
    public_key: bytes
    secret_commitment: bytes
    def __init__(self, version: _Optional[int] = ..., clients: _Optional[int] = ..., value_bits: _Optional[int] = ..., seeded: bool = ..., parameters: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., secret_commitment: _Optional[bytes] = ...) -> None: ...

class SealedKey(_message.Message):
    __slots__ = ("version", "key_id", "index", "sealed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    version: int
    key_id: bytes
    index: int
    sealed: bytes
    def __init__(self, version: _Optional[int] = ..., key_id: _Optional[bytes] = ..., index: _Optional[int] = ..., sealed: _Optional[bytes] = ...) -> None: ...
