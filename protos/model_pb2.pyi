from propolis.protos import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Delegation(_message.Message):
    __slots__ = ("version", "federation", "serial", "public_key", "not_before", "not_after", "models")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NOT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    serial: int
    public_key: bytes
    not_before: int
    not_after: int
    models: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., serial: _Optional[int] = ..., public_key: _Optional[bytes] = ..., not_before: _Optional[int] = ..., not_after: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ...) -> None: ...

class PackagedFile(_message.Message):
    __slots__ = ("name", "size", "digest", "kind")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    digest: bytes
    kind: int
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., digest: _Optional[bytes] = ..., kind: _Optional[int] = ...) -> None: ...

class Measure(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Trial(_message.Message):
    __slots__ = ("largest_difference", "seconds")
    LARGEST_DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    largest_difference: float
    seconds: float
    def __init__(self, largest_difference: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("version", "federation", "name", "sequence", "model_version", "plaintext_digest", "plaintext_size", "ciphertext_digest", "ciphertext_size", "key_commitment", "parent", "run_id", "round", "epsilon", "delta", "evaluation", "created", "expires", "files", "trial", "kem")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAINTEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PLAINTEXT_SIZE_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXT_SIZE_FIELD_NUMBER: _ClassVar[int]
    KEY_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    KEM_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    name: str
    sequence: int
    model_version: int
    plaintext_digest: bytes
    plaintext_size: int
    ciphertext_digest: bytes
    ciphertext_size: int
    key_commitment: bytes
    parent: int
    run_id: bytes
    round: int
    epsilon: float
    delta: float
    evaluation: _containers.RepeatedCompositeFieldContainer[Measure]
    created: int
    expires: int
    files: _containers.RepeatedCompositeFieldContainer[PackagedFile]
    trial: Trial
    kem: int
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., name: _Optional[str] = ..., sequence: _Optional[int] = ..., model_version: _Optional[int] = ..., plaintext_digest: _Optional[bytes] = ..., plaintext_size: _Optional[int] = ..., ciphertext_digest: _Optional[bytes] = ..., ciphertext_size: _Optional[int] = ..., key_commitment: _Optional[bytes] = ..., parent: _Optional[int] = ..., run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., epsilon: _Optional[float] = ..., delta: _Optional[float] = ..., evaluation: _Optional[_Iterable[_Union[Measure, _Mapping]]] = ..., created: _Optional[int] = ..., expires: _Optional[int] = ..., files: _Optional[_Iterable[_Union[PackagedFile, _Mapping]]] = ..., trial: _Optional[_Union[Trial, _Mapping]] = ..., kem: _Optional[int] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("version", "delegation", "manifest", "chunk_digests")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DELEGATION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    version: int
    delegation: _identity_pb2.Signed
    manifest: _identity_pb2.Signed
    chunk_digests: bytes
    def __init__(self, version: _Optional[int] = ..., delegation: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., manifest: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., chunk_digests: _Optional[bytes] = ...) -> None: ...

class WrappedKey(_message.Message):
    __slots__ = ("version", "manifest", "index", "sealed")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: bytes
    index: int
    sealed: bytes
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[bytes] = ..., index: _Optional[int] = ..., sealed: _Optional[bytes] = ...) -> None: ...

class Announcement(_message.Message):
    __slots__ = ("version", "federation", "descriptor", "hybrid_key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    HYBRID_KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    federation: bytes
    descriptor: bytes
    hybrid_key: bytes
    def __init__(self, version: _Optional[int] = ..., federation: _Optional[bytes] = ..., descriptor: _Optional[bytes] = ..., hybrid_key: _Optional[bytes] = ...) -> None: ...

class Trusted(_message.Message):
    __slots__ = ("sequence", "manifest", "serial")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    manifest: bytes
    serial: int
    def __init__(self, sequence: _Optional[int] = ..., manifest: _Optional[bytes] = ..., serial: _Optional[int] = ...) -> None: ...

class Installed(_message.Message):
    __slots__ = ("version", "slots", "newest")
    class Slot(_message.Message):
        __slots__ = ("slot", "model_version", "release")
        SLOT_FIELD_NUMBER: _ClassVar[int]
        MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
        RELEASE_FIELD_NUMBER: _ClassVar[int]
        slot: int
        model_version: int
        release: Trusted
        def __init__(self, slot: _Optional[int] = ..., model_version: _Optional[int] = ..., release: _Optional[_Union[Trusted, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    slots: _containers.RepeatedCompositeFieldContainer[Installed.Slot]
    newest: Trusted
    def __init__(self, version: _Optional[int] = ..., slots: _Optional[_Iterable[_Union[Installed.Slot, _Mapping]]] = ..., newest: _Optional[_Union[Trusted, _Mapping]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("name", "sequence", "manifest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    sequence: int
    manifest: bytes
    def __init__(self, name: _Optional[str] = ..., sequence: _Optional[int] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class LookRequest(_message.Message):
    __slots__ = ("version", "installed", "begun")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTALLED_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    version: int
    installed: _containers.RepeatedCompositeFieldContainer[Release]
    begun: _containers.RepeatedCompositeFieldContainer[Release]
    def __init__(self, version: _Optional[int] = ..., installed: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., begun: _Optional[_Iterable[_Union[Release, _Mapping]]] = ...) -> None: ...

class LookReply(_message.Message):
    __slots__ = ("version", "roster", "offers", "announce")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    roster: int
    offers: _containers.RepeatedCompositeFieldContainer[Release]
    announce: bool
    def __init__(self, version: _Optional[int] = ..., roster: _Optional[int] = ..., offers: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., announce: bool = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("version", "announcement")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCEMENT_FIELD_NUMBER: _ClassVar[int]
    version: int
    announcement: _identity_pb2.Signed
    def __init__(self, version: _Optional[int] = ..., announcement: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RosterRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("version", "release")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    version: int
    release: Release
    def __init__(self, version: _Optional[int] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("version", "header", "key")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    version: int
    header: Header
    key: WrappedKey
    def __init__(self, version: _Optional[int] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., key: _Optional[_Union[WrappedKey, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("version", "release", "first")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    version: int
    release: Release
    first: int
    def __init__(self, version: _Optional[int] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., first: _Optional[int] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("version", "release", "outcome", "reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    version: int
    release: Release
    outcome: int
    reason: str
    def __init__(self, version: _Optional[int] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., outcome: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class HeKeyRequest(_message.Message):
    __slots__ = ("version", "have")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    version: int
    have: bytes
    def __init__(self, version: _Optional[int] = ..., have: _Optional[bytes] = ...) -> None: ...

class HeKeyReply(_message.Message):
    __slots__ = ("version", "bundle")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    version: int
    bundle: bytes
    def __init__(self, version: _Optional[int] = ..., bundle: _Optional[bytes] = ...) -> None: ...
