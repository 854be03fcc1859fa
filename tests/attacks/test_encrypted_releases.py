"""Releases that would have a device decrypt, or serve, something else than the sum of its federation's devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encrypted_app import EncryptedHive, another_key, sum_of
from encrypted_releases import EncryptedSite, linear, opening, trained, under_key, with_first_release
from releasing import key_for, manifest_of, rewritten
from runnable import FLOAT, INPUTS, golden, release, scaled
from secure_app import body_of

from propolis.client.install import Status
from propolis.client.kept_export import open_export, seal_export
from propolis.client.keyholder import Keyholder
from propolis.client.own_export import Weights
from propolis.link.delivery import Outcome
from propolis.package import Package
from propolis.secure.content import unwrap_key
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.he.bfv import HEADER_BYTES, Decryptor
from propolis.secure.he.held import scheme_of
from propolis.secure.he.messages import EncryptedUpload, pieces
from propolis.secure.he.stream import Totals
from propolis.secure.he.tag import tag_bytes
from propolis.secure.manifest import Kind, accept_again, sign_manifest
from propolis.secure.secagg.messages import to_bitmap
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.simulations.federation import SIMULATED
from propolis.simulations.tasks.digits import Digits

Hive = tuple[EncryptedHive, list[bytes]]


@pytest.fixture(scope="module")
def hive() -> Hive:
    return trained()


@pytest.fixture
def site(tmp_path: Path, hive: Hive) -> EncryptedSite:
    """Every device has the model of the first round."""
    return with_first_release(tmp_path, hive)


def uploads(hive: EncryptedHive) -> list[bytes]:
    """The ciphertexts that five devices sent in the last round."""
    return [EncryptedUpload.from_bytes(body_of(reply), 2**24).ciphertexts for reply in hive.wire.said("encrypt")[-5:]]


def one_device_as_all(hive: EncryptedHive) -> bytes:
    return replace(sum_of(hive), ciphertexts=uploads(hive)[0]).to_bytes()


def one_device_as_itself(hive: EncryptedHive) -> bytes:
    index = hive.wire.said("encrypt")[-5].metadata.src_node_id - 1
    return replace(sum_of(hive), ciphertexts=uploads(hive)[0], alive=to_bitmap([index], 5)).to_bytes()


def two_devices(hive: EncryptedHive) -> bytes:
    """A true sum, over fewer than the devices' floor of three."""
    replies = hive.wire.said("encrypt")[-5:-3]
    parameters = hive.keys.public.parameters
    size = scheme_of(parameters).ciphertext_bytes + tag_bytes(parameters)
    totals = Totals(scheme_of(parameters).adder(hive.keys.public.key_id), 1)
    for each in uploads(hive)[:2]:
        totals.add(pieces(each, size))
    alive = sorted(reply.metadata.src_node_id - 1 for reply in replies)
    return replace(sum_of(hive), ciphertexts=b"".join(totals.ciphertexts()), alive=to_bitmap(alive, 5)).to_bytes()


def of_another_key(hive: EncryptedHive) -> bytes:
    other = EncryptedHive(5, federation=replace(hive.federation, he=another_key(hive.federation)))
    return trained(1, other)[1][0]


def changed_by_one_bit(hive: EncryptedHive) -> bytes:
    data = bytearray(sum_of(hive).ciphertexts)
    data[HEADER_BYTES + 99] ^= 1
    return replace(sum_of(hive), ciphertexts=bytes(data)).to_bytes()


FORGED = [one_device_as_all, one_device_as_itself, two_devices, of_another_key, changed_by_one_bit]


@pytest.mark.parametrize("forge", FORGED, ids=lambda each: each.__name__)
def test_what_is_no_sum_of_enough_devices_is_not_decrypted_and_the_old_model_stays(
    site: EncryptedSite, hive: Hive, forge: Callable[[EncryptedHive], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, steps, decrypted = site.factor(), list[Status](), list[bytes]()
    decrypt = Decryptor.decrypt
    monkeypatch.setattr(Decryptor, "decrypt", lambda self, data: (decrypted.append(data), decrypt(self, data))[1])
    package = site.seal(2, under_key(forge(hive[0])))
    with pytest.raises(RefusedError) as caught:
        site.install(package, tell=steps.append)
    refusal = caught.value.refusal
    assert refusal in (Refusal.CIPHERTEXT, Refusal.HE_KEY)  # which key it is under is no secret
    assert steps == [Status(Outcome.FETCHED), Status(Outcome.VERIFIED), Status(Outcome.FAILED, refusal.reason)]
    assert decrypted == []
    assert (site.factor(), site.installed().choice.manifest.sequence) == (before, 1)
    site.install(site.seal(3, under_key(hive[1][1])))  # the true one of the next release is taken
    assert site.factor() != before


def test_a_devices_own_floor_counts(site: EncryptedSite, hive: Hive) -> None:
    with pytest.raises(RefusedError) as caught:
        site.install(site.seal(2, under_key(hive[1][1])), how=opening(policy=replace(SIMULATED, min_cohort=6)))
    assert caught.value.refusal is Refusal.CIPHERTEXT
    assert site.installed().choice.manifest.sequence == 1


def test_metrics_are_no_model(site: EncryptedSite, hive: Hive) -> None:
    grid = hive[0].grid
    hive[0].round("evaluate", **{"server-round": 3})
    assert grid.evaluation is not None
    with pytest.raises(PeerError, match="the metrics of an evaluation, and no model"):
        site.install(site.seal(2, under_key(grid.evaluation.to_bytes())))


def test_a_plain_model_does_not_ride_on_an_encrypted_one(site: EncryptedSite, hive: Hive) -> None:
    mixed = under_key(hive[1][1], **{FLOAT: (scaled(666), Kind.ONNX)})
    with pytest.raises(UsageError, match=r"devices would refuse this package: .* an encrypted model and another one"):
        site.seal(2, mixed)
    odd = site.seal(2, under_key(hive[1][1], **{FLOAT: (scaled(666), Kind.OTHER)}))
    manifest = manifest_of(odd)
    files = tuple(replace(file, kind=Kind.ONNX) if file.name == FLOAT else file for file in manifest.files)
    forged = rewritten(odd, manifest=sign_manifest(replace(manifest, files=files), site.key.key))
    with pytest.raises(PeerError, match="an encrypted model and another one"):
        site.installer().install(forged, key_for(odd), float(manifest.created))
    site.install(odd)  # whatever that file is for, it is not what is served
    assert site.factor() < 1


def test_recorded_outputs_of_others_are_not_what_an_export_is_held_to(site: EncryptedSite, hive: Hive) -> None:
    """The publisher cannot have computed any: who says them would choose what passes."""
    seen = list[bytes]()

    def watched(work: object) -> dict[str, bytes]:
        seen.append(work.golden)  # type: ignore[attr-defined]
        return dict(linear(work))  # type: ignore[arg-type]

    recorded = golden(**{FLOAT: 99.0})
    package = site.seal(2, under_key(hive[1][1], **{"theirs.npz": (recorded, Kind.GOLDEN)}))
    site.install(package, how=opening(export=watched))
    assert seen == [recorded]
    installed = site.installed()
    assert installed.choice.difference == 0
    assert np.array_equal(installed.choice.model.run(INPUTS)["output"], Golden.from_bytes(
        golden(**{FLOAT: site.factor()})).outputs[FLOAT]["output"])  # fmt: skip


# What a device has exported stays its own


def test_an_export_is_encrypted_at_rest_unless_its_owner_wants_it_plain(site: EncryptedSite, hive: Hive) -> None:
    plain = scaled(site.factor())[-40:]
    files = [path for path in site.device(0).rglob("*") if path.is_file()]
    assert any(path.name == "export" for path in files)
    assert all(plain not in path.read_bytes() for path in files)
    package = site.seal(2, under_key(hive[1][1]))
    site.installer().install(package, key_for(package), float(manifest_of(package).created), store_plain=True)
    (folder,) = site.device(0).rglob("plain")
    assert {path.name for path in folder.iterdir()} == {FLOAT, GOLDEN_FILE}


def test_who_sealed_the_package_reads_no_export(site: EncryptedSite, hive: Hive) -> None:
    """The content key is the registry's too: the export is under a key of the device alone."""
    package, sealed = site.sealed(2, under_key(hive[1][1]))
    site.install(package)
    accepted = accept_again(sealed.release, site.keyholder().trust)
    device = site.keyholder()
    assert unwrap_key(key_for(package), accepted, device.descriptor, device.hpke_private) == sealed.content_key
    (kept,) = (path.read_bytes() for path in site.device(0).rglob("export") if "b" in path.parent.name)
    assert open_export(device, accepted.digest, kept)
    thief = replace(device, hpke_private=sealed.content_key)
    with pytest.raises(TrustError):
        open_export(thief, accepted.digest, kept)


@pytest.mark.parametrize("change", ["device", "release", "bit", "cut", "nothing"])
def test_another_export_in_its_place_is_not_served(site: EncryptedSite, hive: Hive, change: str) -> None:
    before, device = site.factor(), site.keyholder()
    package = site.seal(2, under_key(hive[1][1]))
    site.install(package)
    with Package.open(package) as opened:
        digest = opened.release.digest
    (path,) = (each for each in site.device(0).rglob("export") if each.parent.name == "b")
    whole, files = path.read_bytes(), {FLOAT: scaled(666), GOLDEN_FILE: golden(**{FLOAT: 666.0})}
    other: dict[str, Callable[[], bytes]] = {
        "device": lambda: seal_export(site.keyholder(1), digest, files),
        "release": lambda: seal_export(device, bytes(32), files),
        "bit": lambda: whole[:-1] + bytes([whole[-1] ^ 1]),
        "cut": lambda: whole[:-40],
        "nothing": lambda: b"",
    }
    path.write_bytes(other[change]())
    assert site.installed().fell_back
    assert site.factor() == before
    site.install(package)  # the same release again mends it
    assert site.installed().choice.manifest.sequence == 2


def test_a_package_of_the_plain_kind_still_installs_beside_it(site: EncryptedSite) -> None:
    site.install(site.seal(2, release(0.25)))
    assert (site.factor(), len(site.installed().choice.manifest.files)) == (0.25, 3)


def test_trained_weights_do_not_come_in_clear() -> None:
    """What travels beside the ciphertext may only be what training leaves alone: nobody vouches for it."""
    state = {name: tensor.numpy() for name, tensor in Digits().model().state_dict().items()}
    with pytest.raises(UsageError, match="came unencrypted, and is no parameter that training leaves alone"):
        Weights(state, frozenset({next(iter(state))})).file_for(Digits())
    assert Weights(state, frozenset()).file_for(Digits())


def test_the_key_of_a_revoked_holder_opens_nothing(site: EncryptedSite, hive: Hive) -> None:
    roster = replace(site.roster, number=site.roster.number + 1, revoked_releases=(1,))
    signed = site.root.sign_roster(roster)
    from propolis.client.state import FileStore

    FileStore(site.device(0), SIMULATED).change(lambda device: device.take_roster(signed))
    package = site.seal(2, under_key(hive[1][1]))
    with pytest.raises(TrustError) as caught:
        site.installer().install(package, key_for(package), float(manifest_of(package).created))
    assert caught.value.refusal is Refusal.HE_KEY
    assert Keyholder.load(site.device(0)).trust.roster.roster.number == roster.number
