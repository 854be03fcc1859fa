"""Everything that a device must not lose, and must not let anybody else have."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Self

from google.protobuf.message import DecodeError

from propolis.protos import identity_pb2
from propolis.protos import secagg_pb2 as pb
from propolis.secure.errors import PropolisError, StorageError
from propolis.secure.identity import Descriptor, Signed, SigningKey, agreement_key, describe, verify_invitation
from propolis.secure.secagg.plan import Terms
from propolis.secure.secagg.runs import began_at
from propolis.secure.secagg.states import Exchange
from propolis.secure.shamir import RandomBytes
from propolis.secure.wire import STATE_VERSION, decode, fill, read, serialized

# What is remembered of old runs and models; the oldest is forgotten first.
_SECRET_BYTES = 32
_MOST_RUNS, _MOST_REVEALS, _MOST_KEYS = 1024, 4096, 64


@dataclass(frozen=True, slots=True)
class Peer:
    """What a device remembers of another one.

    Attributes:
        descriptor_digest: of the only descriptor that its index may come with.
        signing_key: in that descriptor, which this device has verified.
        invitation_key: that the descriptor is signed with.
        next_prekey: lowest prekey number that has not been sealed to.
    """

    descriptor_digest: bytes
    signing_key: bytes
    invitation_key: bytes
    next_prekey: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """The one answer of an exchange: digest of the request, and the reply once there is one."""

    request: bytes
    reply: bytes = b""


@dataclass(slots=True, repr=False)
class DeviceState:
    """See the module.

    Attributes:
        root_key: the federation's root, 32 bytes.
        signing_key, hpke_private, descriptor: who this device is.
        roster: the highest that it was given.
        prekey_number, prekey_private: what the others seal to in the next round.
        rounding_secret: 32 bytes that the randomness of encoding derives from.
        runs: last (round, attempt) of each run.
        forgotten: when the latest run began that is remembered no more, see `propolis.secure.secagg.runs`.
        peers: by index.
        reveals: how often a sum over a model was revealed, by digest.
        refused_sums: how often an encrypted sum was found to be none, by the id of its key.
        round: state of `SecAggClient`; empty before the first round.
        plan: of that round.
        model: digest of the model that the round's update is over.
        answers: of that round.
    """

    root_key: bytes
    signing_key: SigningKey
    hpke_private: bytes
    descriptor: Signed
    rounding_secret: bytes
    roster: Signed | None = None
    prekey_number: int = 0
    prekey_private: bytes = b""
    runs: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    forgotten: int = 0
    peers: dict[int, Peer] = field(default_factory=dict)
    reveals: dict[bytes, int] = field(default_factory=dict)
    refused_sums: dict[bytes, int] = field(default_factory=dict)
    round: bytes = b""
    plan: bytes = b""
    model: bytes = b""
    answers: dict[Exchange, Answer] = field(default_factory=dict)

    @classmethod
    def enrolled(
        cls, root_key: bytes, invitation: Signed, invitation_key: SigningKey, random_bytes: RandomBytes = os.urandom
    ) -> Self:
        """A new device with keys of its own.

        Args:
            root_key: of the federation, 32 bytes; what the device trusts from here on.
            invitation: signed by the root.
            invitation_key: the invitation's private key, from its token.
            random_bytes: the source of the secret that encoding derives its randomness from.

        Raises:
            TrustError: the invitation is not this root's.
            UsageError: the key is not the invitation's.
        """
        signing_key = SigningKey.generate()
        hpke_private, hpke_public = agreement_key()
        accepted = verify_invitation(root_key, invitation)
        descriptor = describe(accepted, invitation_key, signing_key.public, hpke_public)
        return cls(root_key, signing_key, hpke_private, descriptor, random_bytes(_SECRET_BYTES))

    def copy(self) -> Self:
        """Another state with the same content, to try a step on."""
        return replace(
            self,
            runs=dict(self.runs),
            peers=dict(self.peers),
            reveals=dict(self.reveals),
            refused_sums=dict(self.refused_sums),
            answers=dict(self.answers),
        )

    @property
    def own_descriptor(self) -> Descriptor:
        """This device's descriptor, which it made itself."""
        return decode(Descriptor, self.descriptor.payload, identity_pb2.Descriptor)

    @property
    def index(self) -> int:
        """This device's place in the roster."""
        return self.own_descriptor.index

    def last_of_run(self, run_id: bytes) -> tuple[int, int]:
        """The highest (round, attempt) of a run that this device took part in; (-1, -1) before the first."""
        return self.runs.get(run_id, (-1, -1))

    def is_forgotten(self, run_id: bytes) -> bool:
        """Whether this device may have taken part in a run and no longer know in which attempts."""
        return run_id not in self.runs and began_at(run_id) <= self.forgotten

    def begin_round(self, terms: Terms, round_state: bytes) -> None:
        """Forget the round before, secrets and answers, and begin this one."""
        self.note_attempt(terms.plan.run_id, terms.name)
        self.round, self.plan, self.model, self.answers = round_state, terms.bytes, b"", {}

    def note_attempt(self, run_id: bytes, name: tuple[int, int]) -> None:
        """Note that this device takes part in an attempt, (round, attempt) of a run."""
        self.runs[run_id] = name
        while len(self.runs) > _MOST_RUNS:
            oldest = min(self.runs, key=began_at)
            self.forgotten = max(self.forgotten, began_at(oldest))
            del self.runs[oldest]

    def remember_peer(self, index: int, peer: Peer, prekey_number: int) -> None:
        """Note that something was sealed to a peer's prekey: never again to this one or an older one."""
        self.peers[index] = replace(peer, next_prekey=prekey_number + 1)

    def count_reveal(self, model: bytes) -> None:
        """Note that a sum over a model was revealed."""
        self.reveals[model] = self.reveals.pop(model, 0) + 1
        _forget_oldest(self.reveals, _MOST_REVEALS)

    def count_refused_sum(self, key_id: bytes) -> None:
        """Note that an encrypted sum under a key was none."""
        self.refused_sums[key_id] = self.refused_sums.pop(key_id, 0) + 1
        _forget_oldest(self.refused_sums, _MOST_KEYS)

    def begin_answer(self, exchange: Exchange, request: bytes) -> None:
        """Commit to a request before its reply is there; replies of earlier exchanges are needed no more."""
        for earlier, answer in self.answers.items():
            if earlier < exchange:
                self.answers[earlier] = Answer(answer.request)
        self.answers[exchange] = Answer(request)

    def finish_answer(self, exchange: Exchange, reply: bytes) -> bytes:
        """Keep the reply to the request that `begin_answer` committed to, and return it."""
        self.answers[exchange] = Answer(self.answers[exchange].request, reply)
        return reply

    def to_bytes(self) -> bytes:
        """The state as it is stored; it holds secrets."""
        state = pb.DeviceState(
            version=STATE_VERSION,
            root_key=self.root_key,
            signing_private=self.signing_key.private,
            hpke_private=self.hpke_private,
            prekey_number=self.prekey_number,
            prekey_private=self.prekey_private,
            rounding_secret=self.rounding_secret,
            forgotten=self.forgotten,
            runs=[pb.DeviceState.Run(run_id=run, round=r, attempt=a) for run, (r, a) in self.runs.items()],
            reveals=[pb.DeviceState.Reveal(model=model, count=count) for model, count in self.reveals.items()],
            refused_sums=[pb.DeviceState.RefusedSums(key_id=k, count=n) for k, n in self.refused_sums.items()],
            round=self.round,
            plan=self.plan,
            model=self.model,
        )
        fill(self.descriptor, state.descriptor)
        if self.roster is not None:
            fill(self.roster, state.roster)
        for index, peer in self.peers.items():
            state.peers.add(
                index=index,
                descriptor_digest=peer.descriptor_digest,
                next_prekey=peer.next_prekey,
                signing_key=peer.signing_key,
                invitation_key=peer.invitation_key,
            )
        for exchange, answer in self.answers.items():
            state.answers.add(exchange=exchange, request=answer.request, reply=answer.reply)
        return serialized(state)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The state that `to_bytes` wrote.

        Raises:
            StorageError: the bytes are not a device's state, or of another format.
        """
        try:
            state = pb.DeviceState.FromString(data)
            if state.version != STATE_VERSION:
                raise StorageError(f"the device's state has format {state.version}, this version reads {STATE_VERSION}")
            return cls(
                root_key=state.root_key,
                signing_key=SigningKey(state.signing_private),
                hpke_private=state.hpke_private,
                descriptor=read(Signed, state.descriptor),
                rounding_secret=state.rounding_secret,
                roster=read(Signed, state.roster) if state.HasField("roster") else None,
                prekey_number=state.prekey_number,
                prekey_private=state.prekey_private,
                runs={run.run_id: (run.round, run.attempt) for run in state.runs},
                forgotten=state.forgotten,
                peers={peer.index: _peer(peer) for peer in state.peers},
                reveals={reveal.model: reveal.count for reveal in state.reveals},
                refused_sums={each.key_id: each.count for each in state.refused_sums},
                round=state.round,
                plan=state.plan,
                model=state.model,
                answers={Exchange(a.exchange): Answer(a.request, a.reply) for a in state.answers},
            )
        except (DecodeError, ValueError, PropolisError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError("the device's state is damaged") from None


def _peer(state: pb.DeviceState.Peer) -> Peer:
    return Peer(state.descriptor_digest, state.signing_key, state.invitation_key, state.next_prekey)


def _forget_oldest(entries: dict[bytes, int], most: int) -> None:
    while len(entries) > most:
        del entries[next(iter(entries))]
