"""A device between rounds: requests in, replies out, and one answer per exchange.

Around `SecAggClient`, which knows one round, this keeps what outlives rounds: identity, roster, prekeys, which
rounds were taken part in, which answers were given, how often a model's sum was revealed. It does no I/O: whoever
holds a device loads its state, lets it answer, writes the state down, and only then sends the reply.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from propolis.secure import labels
from propolis.secure.codec.sparsify import Support
from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import (
    Signed,
    TrustedRoster,
    agreement_key,
    announce_prekey,
    descriptor_digest,
    prove_presence,
    trusted_roster,
)
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import Addend
from propolis.secure.secagg.client import Own, SecAggClient
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.masks import public_half
from propolis.secure.secagg.messages import (
    ConfirmRequest,
    HelloReply,
    HelloRequest,
    PrepareRequest,
    UnmaskRequest,
    UploadRequest,
    from_bytes,
    to_bitmap,
    to_bytes,
)
from propolis.secure.secagg.peers import Acquaintances
from propolis.secure.secagg.plan import Encoding, Kind, Plan, Terms, terms_of
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.runs import MOST_AHEAD_MS, began_at
from propolis.secure.secagg.states import Exchange
from propolis.secure.shamir import RandomBytes


@dataclass(frozen=True, slots=True, repr=False)
class Upload:
    """An update ready to be masked, and what it was made from.

    Attributes:
        shared_input: digest of the model, configuration and encoding that the server sent.
        model: digest of the model alone.
        update: what the device adds to the sum.
        lanes: (m,) in Z_2^64.
        metrics: names of the last lanes.
    """

    shared_input: bytes
    model: bytes
    update: Addend
    lanes: Vector
    metrics: tuple[str, ...]


class Device:
    """See the module.

    Args:
        state: what the device must not lose; changed in place.
        policy: the data holder's own limits, of `Policy.on_device`.
        now: seconds since 1970.
        random_bytes: the source of randomness.
    """

    def __init__(self, state: DeviceState, policy: Policy, now: float, random_bytes: RandomBytes = os.urandom) -> None:
        self.state = state
        self._policy, self._now, self._random_bytes = policy, now, random_bytes

    @property
    def now(self) -> float:
        """When this step is taken, seconds since 1970."""
        return self._now

    @property
    def terms(self) -> Terms:
        """Of the round under way.

        Raises:
            PeerError: there is none.
        """
        if not self.state.plan:
            raise PeerError(Refusal.PHASE, "no round is under way")
        return terms_of(self.state.plan)

    def rounding_seed(self, kind: int, number: int) -> bytes:
        """32 bytes that a round's encoding draws from: the same in every attempt, so that a retry adds nothing."""
        return labels.digest(
            labels.ROUNDING, self.state.rounding_secret, kind.to_bytes(8, "big"), number.to_bytes(8, "big")
        )

    def take_roster(self, signed: Signed) -> None:
        """Take over a roster; raises TrustError when it is forged, expired, or older than the one at hand."""
        offered = trusted_roster(self.state.root_key, signed)
        offered.require_current(self._now)
        known = self.state.roster and trusted_roster(self.state.root_key, self.state.roster)
        if known and (offered.number < known.number or (offered.number == known.number and signed != known.signed)):
            raise TrustError(Refusal.ROSTER, f"roster {offered.number} is older than {known.number}, or a second one")
        self.state.roster = offered.signed  # one object for all the devices of a process

    def hello(self, request: bytes) -> bytes:
        """Take over the roster, and announce this device and a new prekey: the old one may have been given away."""
        asked = from_bytes(HelloRequest, request)
        self.take_roster(asked.roster)
        self.state.prekey_number, self.state.prekey_private = self._next_number(), agreement_key()[0]
        prekey = self._prekey()
        proof = prove_presence(self.state.signing_key, self.state.own_descriptor, asked.challenge, prekey)
        return to_bytes(HelloReply(self.state.descriptor, prekey, proof))

    def prepare(self, request: bytes) -> bytes:
        """Accept a round, which ends the one before it and erases its secrets; see `SecAggClient.prepare`."""
        asked = from_bytes(PrepareRequest, request)
        terms = Terms(asked.plan)
        return self._once(Exchange.PREPARE, request, terms, lambda: self._prepare(asked, terms))

    def begin_upload(self, request: bytes, shared_input: bytes) -> bytes | None:
        """Check an upload request before any training.

        Returns:
            The stored reply, when this very request has been answered; otherwise None: train, then `upload`.

        Raises:
            PeerError, TrustError: the request is refused, or one has been begun in this round.
        """
        asked = from_bytes(UploadRequest, request)
        client = self._client(asked.round_tag)
        answer = self.state.answers.get(Exchange.UPLOAD)
        digest = _upload_digest(request, shared_input)
        if answer is None:
            client.check_upload(asked)
            self.state.begin_answer(Exchange.UPLOAD, digest)
            return None
        if answer.request == digest and answer.reply:
            return answer.reply
        # Training twice need not give the same update: what was begun once and lost is lost.
        raise PeerError(Refusal.REPEATED, "an upload was asked for in this round before")

    def upload(self, request: bytes, upload: Upload) -> bytes:
        """Mask an update for the request that `begin_upload` accepted."""
        asked = from_bytes(UploadRequest, request)
        client = self._client(asked.round_tag)
        answer = self.state.answers.get(Exchange.UPLOAD)
        if answer is None or answer.reply or answer.request != _upload_digest(request, upload.shared_input):
            raise PeerError(Refusal.REPEATED, "this upload is not the one that was begun")
        reply = client.upload(asked, upload.shared_input, upload.update, upload.lanes, upload.metrics)
        self.state.model = upload.model
        self.state.round = client.to_bytes()
        return self.state.finish_answer(Exchange.UPLOAD, to_bytes(reply))

    def confirm(self, request: bytes) -> bytes:
        """Sign who is alive, once; see `SecAggClient.confirm`."""
        asked = from_bytes(ConfirmRequest, request)
        client = self._client(asked.round_tag)
        return self._once(Exchange.CONFIRM, request, client.terms, lambda: self._keep(client, client.confirm(asked)))

    def unmask(self, request: bytes) -> bytes:
        """Reveal shares, once; see `SecAggClient.unmask`."""
        asked = from_bytes(UnmaskRequest, request)
        client = self._client(asked.round_tag)

        def reveal() -> bytes:
            self._require_floor(client.terms, len(client.alive_in(asked)))
            self.require_reveals_left(self.state.model, client.terms.kind)
            reply = client.unmask(asked)
            self.count_reveal(self.state.model, client.terms.kind)
            return self._keep(client, reply)

        return self._once(Exchange.UNMASK, request, client.terms, reveal)

    def _once(self, exchange: Exchange, request: bytes, terms: Terms, compute: Callable[[], bytes]) -> bytes:
        """The answer to a request: the stored one when it was given, a new one for a new exchange, never a second."""
        digest = labels.digest(labels.REQUEST, request)
        answer = self.state.answers.get(exchange) if self.state.plan == terms.bytes else None
        if answer is None:
            reply = compute()
            self.state.begin_answer(exchange, digest)
            return self.state.finish_answer(exchange, reply)
        if answer.request != digest:
            raise PeerError(Refusal.REPEATED, f"another {exchange.label} was answered in this round")
        if not answer.reply:
            raise PeerError(Refusal.PHASE, f"the round has gone on since its {exchange.label}")
        return answer.reply

    def _prepare(self, asked: PrepareRequest, terms: Terms) -> bytes:
        roster = self._accept(terms)
        terms = terms_of(asked.plan)
        if asked.prekey_number != self.state.prekey_number or not self.state.prekey_private:
            raise TrustError(Refusal.KEYS, "the neighbours were given another prekey than this device's current one")
        acquaintances = Acquaintances(roster, self.state.peers)
        peers = acquaintances.peers(terms.neighbours(self.state.index), asked)
        neighbours = [
            acquaintances.neighbour(index, peer, prekey)
            for (index, peer), prekey in zip(peers.items(), asked.prekeys, strict=True)
        ]
        digest = descriptor_digest(self.state.descriptor)
        own = Own(self.state.index, digest, self.state.signing_key.private, self.state.prekey_private)
        number = self._next_number()
        next_private, next_public = agreement_key()
        announced = announce_prekey(self.state.signing_key, self.state.own_descriptor, number, next_public)
        client, reply = SecAggClient.prepare(terms, own, neighbours, announced, self._random_bytes)
        # From here on the round before this one is closed: what could open its boxes goes.
        self.state.begin_round(terms, client.to_bytes())
        self.state.prekey_number, self.state.prekey_private = number, next_private
        for neighbour in neighbours:
            self.state.remember_peer(neighbour.index, peers[neighbour.index], neighbour.prekey_number)
        return to_bytes(reply)

    def _accept(self, terms: Terms) -> TrustedRoster:
        """Check a plan against the roster, the rounds taken part in, and the policy."""
        plan = terms.plan
        roster = self.roster()
        require_roster(roster, plan.roster_number, plan.roster_digest)
        if len(plan.cohort) != len(to_bitmap((), len(roster.roster.entries))):
            raise PeerError(Refusal.SETS, "the cohort is no bitmap over the roster")
        self._require_policy_of(plan)
        terms.require_feasible()
        for index in terms.cohort:
            roster.require_member(index)
        if self.state.index not in terms.cohort:
            raise PeerError(Refusal.SETS, "this device is not in the cohort")
        self.require_new(plan.run_id, terms.name)
        threshold, least = terms.sharing.threshold, self._policy.min_threshold
        if threshold < least:
            raise PeerError(Refusal.POLICY, f"{threshold} shares are fewer than {least}")
        return roster

    def _require_policy_of(self, plan: Plan) -> None:
        policy = self._policy
        count = int.from_bytes(plan.cohort, "big").bit_count()
        if count < policy.min_cohort:
            raise PeerError(Refusal.POLICY, f"{count} devices are fewer than {policy.min_cohort}")
        if plan.corrupted_ppm < policy.min_corrupted * 1e6 or plan.dropped_ppm < policy.min_dropped * 1e6:
            raise PeerError(Refusal.POLICY, "the plan assumes fewer corrupted or dropped devices than this device does")
        if policy.require_malicious and not plan.malicious:
            raise PeerError(Refusal.POLICY, "this device asks for protection against a lying server")
        if plan.encoding is not None:
            self._require_policy_of_encoding(plan, plan.encoding)

    def _require_policy_of_encoding(self, plan: Plan, encoding: Encoding) -> None:
        """Support, scale, width and seed are the server's to choose within these limits."""
        policy = self._policy
        self.require_sums_allowed()
        self.require_weight(encoding.weight_key)
        if encoding.width < policy.min_bits:
            raise PeerError(Refusal.POLICY, f"{encoding.width} bits are fewer than {policy.min_bits}")
        if encoding.step > policy.max_step:
            raise PeerError(Refusal.POLICY, f"a step of {encoding.step:g} is coarser than {policy.max_step:g}")
        before = terms_of(self.state.plan).plan if self.state.plan else plan
        is_other_round = before.run_id == plan.run_id and before.round != plan.round
        draws = encoding.rotated or encoding.density < 1
        if draws and is_other_round and before.encoding is not None and encoding.seed == before.encoding.seed:
            raise PeerError(Refusal.POLICY, "the codec's seed is that of another round")

    def require_new(self, run_id: bytes, name: tuple[int, int]) -> None:
        """Refuse an attempt, (round, attempt) of a run, that is not above all that this device took part in.

        Raises:
            PeerError: it is not, or this cannot be known: the run began before others that were forgotten. A run of a
                time that is far from having come is refused too, for it would be remembered in place of true ones.
        """
        if self.state.is_forgotten(run_id):
            raise PeerError(Refusal.STALE, "the run began before others that this device has forgotten")
        if run_id not in self.state.runs and began_at(run_id) > self._now * 1000 + MOST_AHEAD_MS:
            raise PeerError(
                Refusal.STALE, "the run begins more than an hour from now: compare this clock with the server's"
            )
        if name <= self.state.last_of_run(run_id):
            raise PeerError(Refusal.STALE, f"round {name[0]}, attempt {name[1]} is not a new one")

    def require_weight(self, key: str) -> None:
        """Refuse a weight that is not the policy's."""
        if key != self._policy.weight_key:
            raise PeerError(
                Refusal.POLICY, f"this device's weight is {self._policy.weight_key}, not what the plan says"
            )

    def require_share(self, support: Support) -> None:
        """Refuse a round that asks for too small a share of the trained values, whatever makes it so small."""
        least = self._policy.min_density * support.dimension
        if support.size < least:
            raise PeerError(Refusal.POLICY, f"{support.size} of {support.dimension} values are fewer than {least:g}")

    def require_sums_allowed(self) -> None:
        """Refuse a round whose sum the server reads, where the policy does; raises PeerError."""
        if self._policy.require_encryption:
            raise PeerError(Refusal.POLICY, "this device asks for homomorphic encryption (propolis-require-encryption)")

    def take_training(self, model: bytes, kind: Kind) -> None:
        """Count that a secret model is about to be trained or evaluated: how that ends tells the server of it.

        Args:
            model: digest of the model.
            kind: of the round.

        Raises:
            PeerError: that has been done as often as the policy allows.
        """
        allowed, counted = self._policy.max_trainings_per_model, _counted(model, kind, b"trained")
        if allowed is None:
            return
        if self.state.reveals.get(counted, 0) >= allowed:
            raise PeerError(Refusal.REVEALS, f"this model was worked on {allowed} times, as often as allowed")
        self.state.count_reveal(counted)

    def require_reveals_left(self, model: bytes, kind: Kind) -> None:
        """Against differencing: sums over one model are revealed a limited number of times, across all runs.

        Args:
            model: digest of the model.
            kind: of the round.

        Raises:
            PeerError: as many as the policy allows were revealed.
        """
        allowed = self._policy.max_reveals_per_model
        if allowed is not None and self.state.reveals.get(_counted(model, kind), 0) >= allowed:
            raise PeerError(Refusal.REVEALS, f"{allowed} sums over this model were revealed, as many as allowed")

    def count_reveal(self, model: bytes, kind: Kind) -> None:
        """Count a sum, or an error after training: that tells the server something of the data too."""
        if self._policy.max_reveals_per_model is not None:
            self.state.count_reveal(_counted(model, kind))

    def require_trusted_key(self, key_id: bytes) -> None:
        """Against who tries one forgery after the other: a key of homomorphic encryption is used up at some time.

        Args:
            key_id: of the key.

        Raises:
            PeerError: as many sums under it as the policy allows were none.
        """
        if self.state.refused_sums.get(key_id, 0) >= self._policy.max_refused_sums:
            raise PeerError(
                Refusal.HE_KEY,
                f"{self._policy.max_refused_sums} sums under this key were none: its holder has to make another one",
            )

    def _require_floor(self, terms: Terms, alive: int) -> None:
        """Refuse a sum of fewer than the floor, as far as it can be told from this device's neighbours.

        A device sees k of the other n - 1; of a cohort that has shrunk to the floor it would see this many left.
        """
        others = len(terms.cohort) - 1
        fewest = 1 + -(-terms.sharing.degree * (self._policy.min_cohort - 1) // others)
        if alive < fewest:
            raise PeerError(Refusal.POLICY, f"{alive} devices are alive here; with {fewest} the cohort is at its floor")

    def _client(self, round_tag: bytes) -> SecAggClient:
        """The role in the round under way."""
        if not self.state.round:
            raise PeerError(Refusal.PHASE, "no round is under way")
        client = SecAggClient.from_bytes(self.state.round, self.state.signing_key.private)
        if client.terms.tag != round_tag:
            raise PeerError(Refusal.PHASE, "the request is of another round than the one under way")
        return client

    def _keep(self, client: SecAggClient, reply: object) -> bytes:
        self.state.round = client.to_bytes()
        return to_bytes(reply)

    def roster(self) -> TrustedRoster:
        """The newest roster that this device was given; raises TrustError without one, or when it has expired."""
        if self.state.roster is None:
            raise TrustError(Refusal.ROSTER, "this device has not been given the roster")
        roster = trusted_roster(self.state.root_key, self.state.roster)
        roster.require_current(self._now)
        return roster

    def _next_number(self) -> int:
        """A prekey number above all before, also for a device that was set back to an older state."""
        return max(self.state.prekey_number + 1, int(self._now * 1000))

    def _prekey(self) -> Signed:
        public = public_half(self.state.prekey_private)
        return announce_prekey(self.state.signing_key, self.state.own_descriptor, self.state.prekey_number, public)


def require_roster(roster: TrustedRoster, number: int, digest: bytes) -> None:
    """Refuse a plan for another roster than the one that a device has; raises TrustError."""
    if (number, digest) != (roster.number, roster.digest):
        raise TrustError(Refusal.ROSTER, f"the plan is for roster {number}, not for {roster.number}")


def _upload_digest(request: bytes, shared_input: bytes) -> bytes:
    return labels.digest(labels.REQUEST, request, shared_input)


def _counted(model: bytes, kind: Kind, *what: bytes) -> bytes:
    return labels.digest(labels.MODEL, model, kind.name.encode(), *what)
