"""The constants that separate one use of a key or a hash from every other.

Each is the prefix of what is signed, hashed, or given to HKDF or HPKE as info (RFC 5869, section 3.2; RFC 9180,
section 5.1). A signature made under one label verifies under no other.
"""

from __future__ import annotations

import hashlib

INVITATION = b"propolis/1 invitation"
DESCRIPTOR = b"propolis/1 descriptor"
ROSTER = b"propolis/1 roster"
PREKEY = b"propolis/1 prekey"
ENROLMENT = b"propolis/1 enrolment"
TOKEN = b"propolis/1 token"
HELLO = b"propolis/1 hello"
HEAD = b"propolis/1 prepare head"
CONFIRMATION = b"propolis/1 alive set"
ROOT_FINGERPRINT = b"propolis/1 root"
PLAN = b"propolis/1 round plan"
MASK_KEY = b"propolis/1 mask key"
COMMITMENT = b"propolis/1 self-mask seed"
SHARE = b"propolis/1 share"
BOX = b"propolis/1 sealed shares"
LEAF = b"propolis/1 merkle leaf"
NODE = b"propolis/1 merkle node"
PAIRWISE_MASK = b"propolis/1 pairwise mask"
SELF_MASK = b"propolis/1 self mask"
GRAPH = b"propolis/1 neighbour graph"
MODEL = b"propolis/1 model"
INPUT = b"propolis/1 shared input"
REQUEST = b"propolis/1 request"
ROUNDING = b"propolis/1 rounding"
CODEC = b"propolis/1 codec"
BROADCAST = b"propolis/1 broadcast model"
BLOB = b"propolis/1 registry blob"
BLOB_NAME = b"propolis/1 registry blob name"
REGISTRY_KEY = b"propolis/1 registry key"
RELEASED_KEY = b"propolis/1 registry released key"
REGISTRY_ROW = b"propolis/1 registry row"
DELEGATION = b"propolis/1 release key"
MANIFEST = b"propolis/1 model manifest"
CONTENT = b"propolis/1 model content"
CONTENT_KEY = b"propolis/1 content key"
CHUNKS = b"propolis/1 content chunks"
WRAPPED_KEY = b"propolis/1 wrapped key"
KEPT_EXPORT = b"propolis/1 kept export"
ROLLOUT = b"propolis/1 rollout"
ANNOUNCEMENT = b"propolis/1 announced key"
HYBRID_KEY = b"propolis/1 hybrid key"
HE_PARAMETERS = b"propolis/1 he parameters"
HE_KEY = b"propolis/1 he key"
HE_SECRET = b"propolis/1 he secret"
HE_HOLDER = b"propolis/1 he key holder"
HE_STATEMENT = b"propolis/1 he key statement"
HE_SEALED = b"propolis/1 he sealed key"
HE_COEFFICIENTS = b"propolis/1 he tag coefficients"
HE_OFFSETS = b"propolis/1 he tag offsets"
HE_HELD = b"propolis/1 he held key"
HE_ROUND = b"propolis/1 he round"


def digest(label: bytes, *parts: bytes | memoryview) -> bytes:
    """SHA-256 over a label and the parts, each with its length in front: no two lists of parts collide."""
    hashed = hashlib.sha256()
    for part in (label, *parts):
        hashed.update(len(part).to_bytes(8, "big"))
        hashed.update(part)
    return hashed.digest()


def joined(label: bytes, *parts: bytes) -> bytes:
    """A label and parts as one byte string that can be taken apart in one way only."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in (label, *parts))
