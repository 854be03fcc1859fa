from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Delta(_message.Message):
    __slots__ = ("steps", "symbol_bytes", "symbols", "zeros")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SYMBOLS_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedScalarFieldContainer[float]
    symbol_bytes: int
    symbols: bytes
    zeros: bytes
    def __init__(self, steps: _Optional[_Iterable[float]] = ..., symbol_bytes: _Optional[int] = ..., symbols: _Optional[bytes] = ..., zeros: _Optional[bytes] = ...) -> None: ...

class Broadcast(_message.Message):
    __slots__ = ("format", "series", "version", "first", "deltas", "values", "digest")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SERIES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    format: int
    series: bytes
    version: int
    first: int
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    values: bytes
    digest: bytes
    def __init__(self, format: _Optional[int] = ..., series: _Optional[bytes] = ..., version: _Optional[int] = ..., first: _Optional[int] = ..., deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., values: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Remembered(_message.Message):
    __slots__ = ("format", "series", "version", "values")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SERIES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    format: int
    series: bytes
    version: int
    values: bytes
    def __init__(self, format: _Optional[int] = ..., series: _Optional[bytes] = ..., version: _Optional[int] = ..., values: _Optional[bytes] = ...) -> None: ...
