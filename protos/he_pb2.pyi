from propolis.protos import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

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
    __slots__ = ("version", "clients", "value_bits", "seeded", "parameters", "public_key", "secret_commitment", "masked")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    VALUE_BITS_FIELD_NUMBER: _ClassVar[int]
    SEEDED_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SECRET_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    version: int
    clients: int
    value_bits: int
    seeded: bool
    parameters: bytes
    public_key: bytes
    secret_commitment: bytes
    masked: bool
    def __init__(self, version: _Optional[int] = ..., clients: _Optional[int] = ..., value_bits: _Optional[int] = ..., seeded: bool = ..., parameters: _Optional[bytes] = ..., public_key: _Optional[bytes] = ..., secret_commitment: _Optional[bytes] = ..., masked: bool = ...) -> None: ...

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

class KeyBundle(_message.Message):
    __slots__ = ("version", "holder", "statement", "material", "sealed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    MATERIAL_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    version: int
    holder: _identity_pb2.Signed
    statement: _identity_pb2.Signed
    material: bytes
    sealed: bytes
    def __init__(self, version: _Optional[int] = ..., holder: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., statement: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., material: _Optional[bytes] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "dtype", "shape", "exact")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    exact: bool
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., exact: bool = ...) -> None: ...

class EncryptedPlan(_message.Message):
    __slots__ = ("version", "run_id", "round", "attempt", "kind", "roster_number", "roster_digest", "key_id", "weight_key", "max_weight", "range", "entries")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROSTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    version: int
    run_id: bytes
    round: int
    attempt: int
    kind: int
    roster_number: int
    roster_digest: bytes
    key_id: bytes
    weight_key: str
    max_weight: float
    range: float
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, version: _Optional[int] = ..., run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[int] = ..., roster_number: _Optional[int] = ..., roster_digest: _Optional[bytes] = ..., key_id: _Optional[bytes] = ..., weight_key: _Optional[str] = ..., max_weight: _Optional[float] = ..., range: _Optional[float] = ..., entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class EncryptedUpload(_message.Message):
    __slots__ = ("version", "round_tag", "metrics", "ciphertexts")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    round_tag: bytes
    metrics: _containers.RepeatedScalarFieldContainer[str]
    ciphertexts: bytes
    def __init__(self, version: _Optional[int] = ..., round_tag: _Optional[bytes] = ..., metrics: _Optional[_Iterable[str]] = ..., ciphertexts: _Optional[bytes] = ...) -> None: ...

class EncryptedSum(_message.Message):
    __slots__ = ("version", "plan", "alive", "metrics", "ciphertexts", "shared_input", "frozen")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_INPUT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    version: int
    plan: bytes
    alive: bytes
    metrics: _containers.RepeatedScalarFieldContainer[str]
    ciphertexts: bytes
    shared_input: bytes
    frozen: bytes
    def __init__(self, version: _Optional[int] = ..., plan: _Optional[bytes] = ..., alive: _Optional[bytes] = ..., metrics: _Optional[_Iterable[str]] = ..., ciphertexts: _Optional[bytes] = ..., shared_input: _Optional[bytes] = ..., frozen: _Optional[bytes] = ...) -> None: ...
