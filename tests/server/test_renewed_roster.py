"""A roster that changes while a run goes on, and node ids that nobody can lend."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attacks.insiders import CHALLENGE, found, hello_of, refuses
from flwr.serverapp.strategy import FedAvg
from secure_app import MODEL, Hive, outcome_of

from propolis.secure.errors import Refusal, TooFewPeersError
from propolis.secure.identity import TrustedRoster, descriptor_digest, node_id_of
from propolis.server.directory import Directory
from propolis.server.grid import SecureGrid

NEXT = {name: array + 1 for name, array in MODEL.items()}


def test_a_device_that_is_revoked_during_a_run_is_in_no_round_after_it() -> None:
    founded = found(5)
    hive = Hive(5, federation=founded.federation)
    assert outcome_of(hive.round()).survivors == 5
    newer = founded.roster.revoking(2)
    hive.grid.renew(TrustedRoster(founded.root.public_key, founded.root.sign_roster(newer)))
    assert outcome_of(hive.round(model=NEXT)).survivors == 4
    assert 3 not in hive.wire.asked("upload")[-4:]


def test_a_device_that_is_invited_during_a_run_takes_part_in_the_next_round() -> None:
    founded = found(5)
    hive = Hive(5, federation=founded.federation)
    smaller = replace(founded.roster, entries=founded.roster.entries[:4])
    hive.grid._roster = TrustedRoster(founded.root.public_key, founded.root.sign_roster(smaller))
    hive.grid._directory.renew(hive.grid._roster)
    hive.grid._planner.renew(hive.grid._roster)
    assert outcome_of(hive.round()).survivors == 4
    newer = replace(founded.roster, number=founded.roster.number + 1)
    hive.grid.renew(TrustedRoster(founded.root.public_key, founded.root.sign_roster(newer)))
    assert outcome_of(hive.round(model=NEXT)).survivors == 5


def test_an_older_roster_is_not_gone_back_to() -> None:
    founded = found(5)
    hive = Hive(5, federation=founded.federation)
    hive.grid.renew(TrustedRoster(founded.root.public_key, founded.root.sign_roster(founded.roster.revoking(2))))
    hive.grid.renew(founded.federation.verified_roster)
    assert outcome_of(hive.round()).survivors == 4


def test_where_node_ids_are_those_of_descriptors_no_node_speaks_for_another_device() -> None:
    founded = found()
    directory, said = Directory(founded.federation.verified_roster, bound=True), hello_of(founded, 1)
    own = node_id_of(descriptor_digest(said.descriptor))
    with refuses(Refusal.IDENTITY, "connects as another one"):
        directory.take_hello(own + 1, CHALLENGE, said)
    directory.take_hello(own, CHALLENGE, said)
    assert directory.members([own]) == {1: own}


def test_behind_a_link_the_grid_holds_nodes_to_their_descriptors() -> None:
    """Simulated devices are numbered, so none of them is who it should be."""
    hive = Hive(5)
    hive.wire.inner.binds_identities = True  # type: ignore[attr-defined]
    hive.grid = SecureGrid(hive.wire, FedAvg(), hive.federation.verified_roster, hive.protection)
    with pytest.raises(TooFewPeersError, match="0 of 5 devices said hello"):
        hive.round()
