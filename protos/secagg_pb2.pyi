from propolis.protos import identity_pb2 as _identity_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Wire(_message.Message):
    __slots__ = ("version", "suite", "kind", "body")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    version: int
    suite: int
    kind: int
    body: bytes
    def __init__(self, version: _Optional[int] = ..., suite: _Optional[int] = ..., kind: _Optional[int] = ..., body: _Optional[bytes] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("roster", "challenge")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    roster: _identity_pb2.Signed
    challenge: bytes
    def __init__(self, roster: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., challenge: _Optional[bytes] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("descriptor", "prekey", "proof")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    PREKEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    descriptor: _identity_pb2.Signed
    prekey: _identity_pb2.Signed
    proof: bytes
    def __init__(self, descriptor: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., prekey: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., proof: _Optional[bytes] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("version", "suite", "run_id", "round", "attempt", "kind", "roster_number", "roster_digest", "cohort", "malicious", "corrupted_ppm", "dropped_ppm", "encoding", "encrypted")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SUITE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROSTER_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ROSTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    MALICIOUS_FIELD_NUMBER: _ClassVar[int]
    CORRUPTED_PPM_FIELD_NUMBER: _ClassVar[int]
    DROPPED_PPM_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTED_FIELD_NUMBER: _ClassVar[int]
    version: int
    suite: int
    run_id: bytes
    round: int
    attempt: int
    kind: int
    roster_number: int
    roster_digest: bytes
    cohort: bytes
    malicious: bool
    corrupted_ppm: int
    dropped_ppm: int
    encoding: Encoding
    encrypted: bytes
    def __init__(self, version: _Optional[int] = ..., suite: _Optional[int] = ..., run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[int] = ..., roster_number: _Optional[int] = ..., roster_digest: _Optional[bytes] = ..., cohort: _Optional[bytes] = ..., malicious: bool = ..., corrupted_ppm: _Optional[int] = ..., dropped_ppm: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, _Mapping]] = ..., encrypted: _Optional[bytes] = ...) -> None: ...

class Encoding(_message.Message):
    __slots__ = ("width", "step", "levels", "clip", "rotated", "density", "keep", "pruned", "seed", "max_weight", "weight_key", "quantized", "exact")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    ROTATED_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    PRUNED_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_KEY_FIELD_NUMBER: _ClassVar[int]
    QUANTIZED_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    width: int
    step: float
    levels: int
    clip: float
    rotated: bool
    density: float
    keep: int
    pruned: bool
    seed: bytes
    max_weight: float
    weight_key: str
    quantized: _containers.RepeatedScalarFieldContainer[str]
    exact: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, width: _Optional[int] = ..., step: _Optional[float] = ..., levels: _Optional[int] = ..., clip: _Optional[float] = ..., rotated: bool = ..., density: _Optional[float] = ..., keep: _Optional[int] = ..., pruned: bool = ..., seed: _Optional[bytes] = ..., max_weight: _Optional[float] = ..., weight_key: _Optional[str] = ..., quantized: _Optional[_Iterable[str]] = ..., exact: _Optional[_Iterable[str]] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("plan", "prekey_number", "prekeys", "descriptors")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PREKEY_NUMBER_FIELD_NUMBER: _ClassVar[int]
    PREKEYS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    prekey_number: int
    prekeys: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Signed]
    descriptors: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Signed]
    def __init__(self, plan: _Optional[bytes] = ..., prekey_number: _Optional[int] = ..., prekeys: _Optional[_Iterable[_Union[_identity_pb2.Signed, _Mapping]]] = ..., descriptors: _Optional[_Iterable[_Union[_identity_pb2.Signed, _Mapping]]] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("head", "deliveries", "next_prekey", "seed_commitment")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PREKEY_FIELD_NUMBER: _ClassVar[int]
    SEED_COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    head: _identity_pb2.Signed
    deliveries: bytes
    next_prekey: _identity_pb2.Signed
    seed_commitment: bytes
    def __init__(self, head: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., deliveries: _Optional[bytes] = ..., next_prekey: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., seed_commitment: _Optional[bytes] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("mask_key", "root")
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    mask_key: bytes
    root: bytes
    def __init__(self, mask_key: _Optional[bytes] = ..., root: _Optional[bytes] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("round_tag", "silent", "heads")
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    SILENT_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    silent: bytes
    heads: _containers.RepeatedCompositeFieldContainer[_identity_pb2.Signed]
    def __init__(self, round_tag: _Optional[bytes] = ..., silent: _Optional[bytes] = ..., heads: _Optional[_Iterable[_Union[_identity_pb2.Signed, _Mapping]]] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("round_tag", "vector", "lanes", "metrics")
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    vector: bytes
    lanes: bytes
    metrics: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, round_tag: _Optional[bytes] = ..., vector: _Optional[bytes] = ..., lanes: _Optional[bytes] = ..., metrics: _Optional[_Iterable[str]] = ...) -> None: ...

class ConfirmRequest(_message.Message):
    __slots__ = ("round_tag", "alive")
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    alive: bytes
    def __init__(self, round_tag: _Optional[bytes] = ..., alive: _Optional[bytes] = ...) -> None: ...

class ConfirmReply(_message.Message):
    __slots__ = ("round_tag", "signature")
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    signature: bytes
    def __init__(self, round_tag: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UnmaskRequest(_message.Message):
    __slots__ = ("round_tag", "dropped", "deliveries", "confirmations")
    class Confirmation(_message.Message):
        __slots__ = ("index", "signature")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        SIGNATURE_FIELD_NUMBER: _ClassVar[int]
        index: int
        signature: bytes
        def __init__(self, index: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    DELIVERIES_FIELD_NUMBER: _ClassVar[int]
    CONFIRMATIONS_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    dropped: bytes
    deliveries: bytes
    confirmations: _containers.RepeatedCompositeFieldContainer[UnmaskRequest.Confirmation]
    def __init__(self, round_tag: _Optional[bytes] = ..., dropped: _Optional[bytes] = ..., deliveries: _Optional[bytes] = ..., confirmations: _Optional[_Iterable[_Union[UnmaskRequest.Confirmation, _Mapping]]] = ...) -> None: ...

class UnmaskReply(_message.Message):
    __slots__ = ("round_tag", "shares", "unopened")
    ROUND_TAG_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    UNOPENED_FIELD_NUMBER: _ClassVar[int]
    round_tag: bytes
    shares: bytes
    unopened: bytes
    def __init__(self, round_tag: _Optional[bytes] = ..., shares: _Optional[bytes] = ..., unopened: _Optional[bytes] = ...) -> None: ...

class ClientState(_message.Message):
    __slots__ = ("version", "plan", "index", "descriptor_digest", "phase", "mask_secret", "seed", "prekey_private", "prekey_number", "neighbours", "alive")
    class Neighbour(_message.Message):
        __slots__ = ("index", "descriptor_digest", "signing_key", "head")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        DESCRIPTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
        SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
        HEAD_FIELD_NUMBER: _ClassVar[int]
        index: int
        descriptor_digest: bytes
        signing_key: bytes
        head: Head
        def __init__(self, index: _Optional[int] = ..., descriptor_digest: _Optional[bytes] = ..., signing_key: _Optional[bytes] = ..., head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    MASK_SECRET_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PREKEY_PRIVATE_FIELD_NUMBER: _ClassVar[int]
    PREKEY_NUMBER_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    version: int
    plan: bytes
    index: int
    descriptor_digest: bytes
    phase: int
    mask_secret: bytes
    seed: bytes
    prekey_private: bytes
    prekey_number: int
    neighbours: _containers.RepeatedCompositeFieldContainer[ClientState.Neighbour]
    alive: bytes
    def __init__(self, version: _Optional[int] = ..., plan: _Optional[bytes] = ..., index: _Optional[int] = ..., descriptor_digest: _Optional[bytes] = ..., phase: _Optional[int] = ..., mask_secret: _Optional[bytes] = ..., seed: _Optional[bytes] = ..., prekey_private: _Optional[bytes] = ..., prekey_number: _Optional[int] = ..., neighbours: _Optional[_Iterable[_Union[ClientState.Neighbour, _Mapping]]] = ..., alive: _Optional[bytes] = ...) -> None: ...

class ServerState(_message.Message):
    __slots__ = ("version", "plan", "uploading", "fixed_lanes", "members", "total", "lanes", "metrics")
    class Share(_message.Message):
        __slots__ = ("dealer", "value")
        DEALER_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        dealer: int
        value: bytes
        def __init__(self, dealer: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    class Member(_message.Message):
        __slots__ = ("descriptor", "prekey", "head", "deliveries", "upload_request", "uploaded", "confirmation", "shares", "index", "server_record")
        DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
        PREKEY_FIELD_NUMBER: _ClassVar[int]
        HEAD_FIELD_NUMBER: _ClassVar[int]
        DELIVERIES_FIELD_NUMBER: _ClassVar[int]
        UPLOAD_REQUEST_FIELD_NUMBER: _ClassVar[int]
        UPLOADED_FIELD_NUMBER: _ClassVar[int]
        CONFIRMATION_FIELD_NUMBER: _ClassVar[int]
        SHARES_FIELD_NUMBER: _ClassVar[int]
        INDEX_FIELD_NUMBER: _ClassVar[int]
        SERVER_RECORD_FIELD_NUMBER: _ClassVar[int]
        descriptor: _identity_pb2.Signed
        prekey: _identity_pb2.Signed
        head: _identity_pb2.Signed
        deliveries: bytes
        upload_request: bytes
        uploaded: bool
        confirmation: bytes
        shares: _containers.RepeatedCompositeFieldContainer[ServerState.Share]
        index: int
        server_record: bytes
        def __init__(self, descriptor: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., prekey: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., head: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., deliveries: _Optional[bytes] = ..., upload_request: _Optional[bytes] = ..., uploaded: bool = ..., confirmation: _Optional[bytes] = ..., shares: _Optional[_Iterable[_Union[ServerState.Share, _Mapping]]] = ..., index: _Optional[int] = ..., server_record: _Optional[bytes] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    UPLOADING_FIELD_NUMBER: _ClassVar[int]
    FIXED_LANES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    version: int
    plan: bytes
    uploading: bool
    fixed_lanes: int
    members: _containers.RepeatedCompositeFieldContainer[ServerState.Member]
    total: bytes
    lanes: bytes
    metrics: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., plan: _Optional[bytes] = ..., uploading: bool = ..., fixed_lanes: _Optional[int] = ..., members: _Optional[_Iterable[_Union[ServerState.Member, _Mapping]]] = ..., total: _Optional[bytes] = ..., lanes: _Optional[bytes] = ..., metrics: _Optional[_Iterable[str]] = ...) -> None: ...

class DeviceState(_message.Message):
    __slots__ = ("version", "root_key", "signing_private", "hpke_private", "descriptor", "roster", "prekey_number", "prekey_private", "rounding_secret", "runs", "peers", "reveals", "round", "plan", "model", "answers", "refused_sums", "forgotten")
    class Run(_message.Message):
        __slots__ = ("run_id", "round", "attempt")
        RUN_ID_FIELD_NUMBER: _ClassVar[int]
        ROUND_FIELD_NUMBER: _ClassVar[int]
        ATTEMPT_FIELD_NUMBER: _ClassVar[int]
        run_id: bytes
        round: int
        attempt: int
        def __init__(self, run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...
    class Peer(_message.Message):
        __slots__ = ("index", "descriptor_digest", "next_prekey", "signing_key", "invitation_key")
        INDEX_FIELD_NUMBER: _ClassVar[int]
        DESCRIPTOR_DIGEST_FIELD_NUMBER: _ClassVar[int]
        NEXT_PREKEY_FIELD_NUMBER: _ClassVar[int]
        SIGNING_KEY_FIELD_NUMBER: _ClassVar[int]
        INVITATION_KEY_FIELD_NUMBER: _ClassVar[int]
        index: int
        descriptor_digest: bytes
        next_prekey: int
        signing_key: bytes
        invitation_key: bytes
        def __init__(self, index: _Optional[int] = ..., descriptor_digest: _Optional[bytes] = ..., next_prekey: _Optional[int] = ..., signing_key: _Optional[bytes] = ..., invitation_key: _Optional[bytes] = ...) -> None: ...
    class Reveal(_message.Message):
        __slots__ = ("model", "count")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        model: bytes
        count: int
        def __init__(self, model: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...
    class RefusedSums(_message.Message):
        __slots__ = ("key_id", "count")
        KEY_ID_FIELD_NUMBER: _ClassVar[int]
        COUNT_FIELD_NUMBER: _ClassVar[int]
        key_id: bytes
        count: int
        def __init__(self, key_id: _Optional[bytes] = ..., count: _Optional[int] = ...) -> None: ...
    class Answer(_message.Message):
        __slots__ = ("exchange", "request", "reply")
        EXCHANGE_FIELD_NUMBER: _ClassVar[int]
        REQUEST_FIELD_NUMBER: _ClassVar[int]
        REPLY_FIELD_NUMBER: _ClassVar[int]
        exchange: int
        request: bytes
        reply: bytes
        def __init__(self, exchange: _Optional[int] = ..., request: _Optional[bytes] = ..., reply: _Optional[bytes] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNING_PRIVATE_FIELD_NUMBER: _ClassVar[int]
    HPKE_PRIVATE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PREKEY_NUMBER_FIELD_NUMBER: _ClassVar[int]
    PREKEY_PRIVATE_FIELD_NUMBER: _ClassVar[int]
    ROUNDING_SECRET_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    REVEALS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_SUMS_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    version: int
    root_key: bytes
    signing_private: bytes
    hpke_private: bytes
    descriptor: _identity_pb2.Signed
    roster: _identity_pb2.Signed
    prekey_number: int
    prekey_private: bytes
    rounding_secret: bytes
    runs: _containers.RepeatedCompositeFieldContainer[DeviceState.Run]
    peers: _containers.RepeatedCompositeFieldContainer[DeviceState.Peer]
    reveals: _containers.RepeatedCompositeFieldContainer[DeviceState.Reveal]
    round: bytes
    plan: bytes
    model: bytes
    answers: _containers.RepeatedCompositeFieldContainer[DeviceState.Answer]
    refused_sums: _containers.RepeatedCompositeFieldContainer[DeviceState.RefusedSums]
    forgotten: int
    def __init__(self, version: _Optional[int] = ..., root_key: _Optional[bytes] = ..., signing_private: _Optional[bytes] = ..., hpke_private: _Optional[bytes] = ..., descriptor: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., roster: _Optional[_Union[_identity_pb2.Signed, _Mapping]] = ..., prekey_number: _Optional[int] = ..., prekey_private: _Optional[bytes] = ..., rounding_secret: _Optional[bytes] = ..., runs: _Optional[_Iterable[_Union[DeviceState.Run, _Mapping]]] = ..., peers: _Optional[_Iterable[_Union[DeviceState.Peer, _Mapping]]] = ..., reveals: _Optional[_Iterable[_Union[DeviceState.Reveal, _Mapping]]] = ..., round: _Optional[bytes] = ..., plan: _Optional[bytes] = ..., model: _Optional[bytes] = ..., answers: _Optional[_Iterable[_Union[DeviceState.Answer, _Mapping]]] = ..., refused_sums: _Optional[_Iterable[_Union[DeviceState.RefusedSums, _Mapping]]] = ..., forgotten: _Optional[int] = ...) -> None: ...
