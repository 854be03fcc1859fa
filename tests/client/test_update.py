"""The mod: it answers the protocol's exchanges alone, and what the app does wrong costs one device one round."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from secure_app import MODEL, Hive, Work, answer, arrays_of, honest, metrics_of, outcome_of, record, require_mean, shift

from propolis.client.state import policy_of
from propolis.client.update import SecureMod, node_store, secure_mod
from propolis.flower import set_identity
from propolis.messages import RECORD, open_record, protocol_record, refusal_of
from propolis.secure.errors import Refusal, StorageError, TooFewPeersError, UsageError
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.simulations.federation import SIMULATED

PATIENT = "the patient's name"
TINY = np.full((4, 3), 1 / 64, np.float32)


def unwell(what: Callable[[Message], RecordDict]) -> Work:
    """Device 1 answers something else than the others do."""
    return lambda message, index: what(message) if index == 1 else honest(message, index)


def code_of(reply: Message) -> Refusal:
    """The refusal in an error reply, which says nothing else."""
    assert reply.has_error()
    refusal = refusal_of(reply.error.code)
    assert refusal is not None
    assert reply.error.code == 1000 + refusal
    assert reply.error.reason == refusal.reason
    assert not reply.has_content()
    return refusal


def ask(content: RecordDict, kind: str = "train", work: Work = honest, hive: Hive | None = None) -> Message:
    """One message to one device."""
    hive = hive or Hive(3, work)
    message = hive.grid.create_message(content, kind, 2, "")
    (reply,) = hive.wire.inner.send_and_receive([message], timeout=60)
    return reply


# What is asked outside of the protocol


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"arrays": record(MODEL)})], ids=["empty", "model"])
def test_a_message_outside_of_the_protocol_is_refused_and_the_app_hears_nothing(kind: str, content: RecordDict) -> None:
    asked: list[int] = []

    def work(message: Message, index: int) -> RecordDict:
        asked.append(index)
        return honest(message, index)

    assert code_of(ask(content, kind, work)) is Refusal.UNPROTECTED
    assert not asked


def test_the_owner_may_let_the_server_see_this_devices_own_values() -> None:
    """Then the app answers outside of secure rounds, and in one it is protected as ever."""
    owned = replace(SIMULATED, allow_unprotected=True)
    hive = Hive(3, policy=owned)
    reply = ask(RecordDict({"arrays": record(MODEL)}), hive=hive)
    np.testing.assert_allclose(arrays_of(reply)["w"], MODEL["w"] + shift(1))
    require_mean(hive.round(), range(3))
    assert code_of(ask(malformed(nonsense=b"x"), hive=hive)) is Refusal.MALFORMED


def malformed(**values: Any) -> RecordDict:
    return RecordDict({RECORD: ConfigRecord(values)})


@pytest.mark.parametrize(
    "content",
    [
        malformed(),
        malformed(PREPARE=b""),
        malformed(train=b""),
        malformed(prepare=b"", unmask=b""),
        malformed(prepare=b"", note="more"),
        malformed(prepare="text"),
        malformed(prepare=2),
        malformed(upload=[b"", b""]),
        *(
            RecordDict({"arrays": record(MODEL), RECORD: protocol_record(exchange, body)})
            for exchange in Exchange
            for body in (b"", b"\xff" * 99)
        ),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_garbage_is_refused_as_malformed(content: RecordDict, kind: str) -> None:
    # What is no request at all is found out when the round that it is for is looked up.
    is_upload = len(content) == 2 and open_record(content)[0] is Exchange.UPLOAD
    assert code_of(ask(content, kind)) is (Refusal.PHASE if is_upload else Refusal.MALFORMED)


@pytest.mark.parametrize("wrong", [MetricRecord({"exchange": 1}), ArrayRecord()], ids=["metrics", "arrays"])
def test_a_record_of_another_type_is_no_protocol(wrong: MetricRecord | ArrayRecord) -> None:
    assert code_of(ask(RecordDict({RECORD: wrong}))) is Refusal.UNPROTECTED


def test_an_error_for_a_message_is_answered_and_not_raised() -> None:
    set_identity(1)
    message = Message(Error(7, "lost"), reply_to=Message(RecordDict(), dst_node_id=1, message_type="train"))
    code_of(secure_mod(message, Context(1, 1, {}, RecordDict(), {}), lambda m, c: m))


@pytest.mark.parametrize(
    "raised", [RuntimeError(PATIENT), UsageError(PATIENT), StorageError(PATIENT), KeyError(PATIENT)]
)
def test_a_store_that_fails_is_a_code_and_no_text(raised: Exception) -> None:
    def broken(context: Context) -> Any:
        raise raised

    set_identity(1)
    message = Message(RecordDict({RECORD: protocol_record(Exchange.HELLO, b"")}), dst_node_id=1, message_type="train")
    reply = SecureMod(broken)(message, Context(1, 1, {}, RecordDict(), {}), lambda m, c: m)
    assert code_of(reply) is Refusal.STORAGE


@pytest.mark.parametrize("config", [{}, {"propolis-dir": ""}, {"propolis-dir": 3}])
def test_a_node_that_was_never_enrolled_says_so(config: dict[str, Any]) -> None:
    set_identity(1)
    message = Message(RecordDict({RECORD: protocol_record(Exchange.HELLO, b"")}), dst_node_id=1, message_type="train")
    context = Context(1, 1, config, RecordDict(), {"propolis-dir": "/tmp"})  # noqa: S108
    assert code_of(secure_mod(message, context, lambda m, c: m)) is Refusal.NOT_ENROLLED


# What the app sees and when


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_app_works_once_a_round_and_sees_the_message_without_the_record(kind: str) -> None:
    seen: list[tuple[int, set[str], str]] = []

    def work(message: Message, index: int) -> RecordDict:
        seen.append((index, set(message.content), message.metadata.message_type))
        return honest(message, index)

    Hive(3, work).round(kind, lr=0.5)
    assert seen == [(index, {"arrays", "config"}, kind) for index in range(3)]


# What the app may do wrong


def with_metrics(**values: Any) -> Callable[[Message], RecordDict]:
    """Trained like the others, with these metrics over the usual ones; None leaves one out."""

    def work(message: Message) -> RecordDict:
        content = honest(message, 1)
        metrics = {
            **metrics_of(Message(content, reply_to=message)),
            **{k.replace("_", "-"): v for k, v in values.items()},
        }
        content["metrics"] = MetricRecord({name: value for name, value in metrics.items() if value is not None})
        return content

    return work


def with_arrays(**changes: Any) -> Callable[[Message], RecordDict]:
    """Trained like the others, with these arrays over the usual ones; None leaves one out."""

    def work(message: Message) -> RecordDict:
        content = honest(message, 1)
        arrays = {**arrays_of(Message(content, reply_to=message)), **changes}
        content["arrays"] = record({name: array for name, array in arrays.items() if array is not None})
        return content

    return work


def without(name: str) -> Callable[[Message], RecordDict]:
    return lambda message: RecordDict({key: each for key, each in honest(message, 1).items() if key != name})


def with_another(name: str) -> Callable[[Message], RecordDict]:
    def work(message: Message) -> RecordDict:
        content = honest(message, 1)
        content[f"second {name}"] = content[name]
        return content

    return work


def malformed_array(message: Message) -> RecordDict:
    content = honest(message, 1)
    content["arrays"] = ArrayRecord({**content["arrays"], "w": Array("float32", (4, 3), "numpy.ndarray", b"\x93NUMPY")})
    return content


def raising(message: Message) -> RecordDict:
    raise ValueError(PATIENT)


def filled(value: float) -> np.ndarray:
    array = MODEL["w"].copy()
    array[3, 2] = value
    return array


FAULTS: dict[str, tuple[Callable[[Message], RecordDict], Refusal]] = {
    "raises": (raising, Refusal.TRAINING_FAILED),
    "nan": (with_arrays(w=filled(np.nan)), Refusal.NOT_FINITE),
    "inf": (with_arrays(w=filled(np.inf)), Refusal.NOT_FINITE),
    "minus inf": (with_arrays(w=filled(-np.inf)), Refusal.NOT_FINITE),
    "nan metric": (with_metrics(loss=np.nan), Refusal.NOT_FINITE),
    "inf metric": (with_metrics(loss=np.inf), Refusal.NOT_FINITE),
    "shape": (with_arrays(w=TINY[:3]), Refusal.MODEL),
    "transposed": (with_arrays(w=TINY.T.copy()), Refusal.MODEL),
    "flat": (with_arrays(w=TINY.ravel()), Refusal.MODEL),
    "broadcast": (with_arrays(w=TINY[:1]), Refusal.MODEL),
    "complex": (with_arrays(w=TINY.astype(np.complex64)), Refusal.MODEL),
    "text": (with_arrays(w=np.full((4, 3), "1")), Refusal.MODEL),
    "malformed": (malformed_array, Refusal.MODEL),
    "empty array": (with_arrays(w=np.zeros(0, np.float32)), Refusal.MODEL),
    "empty update": (with_arrays(w=None, b=None), Refusal.MODEL),
    "missing name": (with_arrays(b=None), Refusal.MODEL),
    "extra name": (with_arrays(more=TINY), Refusal.MODEL),
    "no arrays": (without("arrays"), Refusal.MODEL),
    "two arrays": (with_another("arrays"), Refusal.MODEL),
    "no metrics": (without("metrics"), Refusal.MODEL),
    "two metrics": (with_another("metrics"), Refusal.MODEL),
    "list metric": (with_metrics(loss=[1.0, 2.0]), Refusal.MODEL),
    "no weight": (with_metrics(num_examples=None), Refusal.WEIGHT),
    "list weight": (with_metrics(num_examples=[2]), Refusal.WEIGHT),
    "zero weight": (with_metrics(num_examples=0), Refusal.WEIGHT),
    "negative weight": (with_metrics(num_examples=-2), Refusal.WEIGHT),
    "nan weight": (with_metrics(num_examples=np.nan), Refusal.WEIGHT),
    "inf weight": (with_metrics(num_examples=np.inf), Refusal.WEIGHT),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_app_is_a_drop_out_with_a_code_and_the_round_goes_on(fault: str) -> None:
    work, refusal = FAULTS[fault]
    hive = Hive(5, unwell(work))
    reply = hive.round()
    require_mean(reply, [0, 2, 3, 4])
    outcome = outcome_of(reply)
    assert (outcome.survivors, outcome.asked) == (4, 5)
    assert outcome.failures == (f"upload: {refusal.reason}",)
    (error,) = (each for each in hive.wire.replies if each.has_error())
    assert code_of(error) is refusal
    assert PATIENT.encode() not in hive.wire.uplink()


@pytest.mark.parametrize("kind", [np.float32, np.bool_, np.uint64])
def test_a_counter_that_comes_back_as_something_else_is_refused(kind: type) -> None:
    model = {**MODEL, "count": np.array(7, np.int64)}

    def work(message: Message, index: int) -> RecordDict:
        arrays = {**arrays_of(message), "w": MODEL["w"]}
        return answer({**arrays, "count": arrays["count"].astype(kind if index == 1 else np.int64)}, num_examples=1)

    reply = Hive(5, work).round(model=model)
    assert outcome_of(reply).failures == ("upload: model",)
    assert arrays_of(reply)["count"] == 7


@pytest.mark.parametrize("kind", [np.float16, np.float64])
@pytest.mark.parametrize("index", [0, 1])
def test_floating_types_may_differ_between_the_model_and_the_update(kind: type, index: int) -> None:
    """Some of Flower's strategies make the model double, and torch answers in single precision."""

    def work(message: Message, own: int) -> RecordDict:
        content = honest(message, own)
        arrays = arrays_of(Message(content, reply_to=message))
        if own == index:
            content["arrays"] = record({name: array.astype(kind) for name, array in arrays.items()})
        return content

    reply = Hive(5, work).round()
    require_mean(reply, range(5), tolerance=5e-3)
    assert {array.dtype for array in arrays_of(reply).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("fault", ["raises", "nan metric", "no metrics", "list metric", "no weight", "inf weight"])
def test_a_fault_in_evaluation_is_a_drop_out_too(fault: str) -> None:
    work, refusal = FAULTS[fault]
    hive = Hive(5, lambda message, index: work(message) if index == 1 else answer(num_examples=1, loss=0.25))
    reply = hive.round("evaluate")
    assert outcome_of(reply).failures == (f"upload: {refusal.reason}",)
    assert metrics_of(reply)["loss"] == pytest.approx(0.25)


def test_an_app_that_exits_is_a_drop_out() -> None:
    hive = Hive(5, unwell(lambda message: sys.exit(3)))
    assert outcome_of(hive.round()).failures == ("upload: training-failed",)


def test_an_app_that_answers_no_message_is_a_drop_out() -> None:
    hive = Hive(5, unwell(lambda message: None))  # type: ignore[arg-type, return-value]
    assert outcome_of(hive.round()).survivors == 4


@pytest.mark.parametrize("asked", ["train", "evaluate"])
def test_a_message_of_another_type_than_the_rounds_is_refused_before_any_training(asked: str) -> None:
    """A server could have evaluation's few lanes carry a training round's values, or train when it said evaluate."""
    trained: list[int] = []

    def work(message: Message, index: int) -> RecordDict:
        trained.append(index)
        return honest(message, index)

    def retyped(exchange: str, message: Message) -> Message:
        if exchange == "upload" and message.metadata.dst_node_id == 2:
            other = "evaluate" if asked == "train" else "train"
            return hive.wire.create_message(message.content, other, 2, "")
        return message

    hive = Hive(5, work)
    hive.wire.deliver = retyped
    assert outcome_of(hive.round(asked)).failures == ("upload: model",)
    assert trained == [0, 2, 3, 4]


def test_arrays_that_the_plan_names_and_the_message_lacks_are_refused_before_any_training() -> None:
    trained: list[int] = []

    def work(message: Message, index: int) -> RecordDict:
        trained.append(index)
        return honest(message, index)

    def stripped(exchange: str, message: Message) -> Message:
        if (exchange, message.metadata.dst_node_id) != ("upload", 2):
            return message
        part = RecordDict({**message.content, "arrays": record({"w": MODEL["w"]})})
        return hive.wire.create_message(part, "train", 2, "")

    hive = Hive(5, work, attempts=1)
    hive.wire.deliver = stripped
    assert outcome_of(hive.round()).failures == ("upload: model",)
    assert trained == [0, 2, 3, 4]


# The data holder's own limits


def test_a_device_cuts_its_weight_to_its_own_limit() -> None:
    reply = Hive(3, policy=Policy(max_weight=2.0)).round()  # the others have 1, 2 and 3
    assert metrics_of(reply)["num-examples"] == pytest.approx(5.0)
    expected = (1 * shift(0) + 2 * shift(1) + 2 * shift(2)) / 5
    np.testing.assert_allclose(arrays_of(reply)["w"], MODEL["w"] + expected, atol=1e-3)


def test_a_limit_does_not_mend_a_weight_that_is_no_number() -> None:
    work, _ = FAULTS["nan weight"]
    assert outcome_of(Hive(5, unwell(work), policy=Policy(max_weight=2.0)).round()).failures == ("upload: weight",)


def test_a_device_scales_its_change_to_its_own_limit() -> None:
    norm = float(np.sqrt(15)) * shift(1)  # of the second device's change
    reply = Hive(3, policy=Policy(max_norm=norm), bits=24).round()
    expected = (1 * shift(0) + 2 * shift(1) + 3 * shift(1)) / 6
    np.testing.assert_allclose(arrays_of(reply)["w"], MODEL["w"] + expected, atol=1e-5)


STRICT = {
    "min_cohort": (Policy(min_cohort=6), "prepare: policy"),
    "min_threshold": (Policy(min_threshold=4), "prepare: policy"),
    "min_corrupted": (Policy(min_corrupted=0.2), "prepare: policy"),
    "min_dropped": (Policy(min_dropped=0.3), "prepare: policy"),
    "require_malicious": (Policy(require_malicious=True), "prepare: policy"),
}


@pytest.mark.parametrize("limit", STRICT)
def test_the_server_cannot_talk_a_device_out_of_its_policy(limit: str) -> None:
    policy, said = STRICT[limit]
    hive = Hive(5, policy=policy)
    config = {f"propolis-{limit.replace('_', '-')}": False if limit == "require_malicious" else 1}
    with pytest.raises(TooFewPeersError, match=said):
        hive.round(**config)


def test_nothing_that_the_server_configures_becomes_policy(tmp_path: Path) -> None:
    own = {"propolis-dir": str(tmp_path), "propolis-min-cohort": 9}
    servers = {"propolis-dir": "/tmp", "propolis-min-cohort": 2, "propolis-max-reveals": 99}  # noqa: S108
    assert node_store(Context(1, 1, own, RecordDict(), servers)).policy == Policy(min_cohort=9)


def test_a_policys_limit_on_reveals_holds_across_rounds() -> None:
    hive = Hive(3, policy=Policy(max_reveals_per_model=2))
    hive.round()
    hive.round()
    with pytest.raises(TooFewPeersError, match=r"0 of 3 devices sent a masked update.* one said: upload: reveals"):
        hive.round()
    hive.round(model={name: array + 1 for name, array in MODEL.items()})
    hive.round("evaluate")


def test_an_error_after_training_counts_like_a_sum_for_it_tells_something_too() -> None:
    """A server could have a crafted model fail, or not, by what the data are."""
    hive = Hive(5, unwell(lambda message: sys.exit(3)), policy=Policy(max_reveals_per_model=2))
    assert [outcome_of(hive.round()).failures for _ in range(2)] == [("upload: training-failed",)] * 2
    counts = [store.change(lambda device: list(device.state.reveals.values())) for store in hive.stores]
    assert counts == [[2]] * 5
    with pytest.raises(TooFewPeersError, match="upload: reveals"):
        hive.round()


def test_a_device_keeps_its_weight_key_to_itself() -> None:
    """A server that could choose would compare any metric with any bound."""
    hive = Hive(3, strategy=FedAvg(weighted_by_key="loss"))
    with pytest.raises(TooFewPeersError, match="prepare: policy"):
        hive.round()


def test_a_policy_comes_from_the_nodes_configuration() -> None:
    config = {
        "propolis-min-cohort": 5,
        "propolis-min-threshold": 2,
        "propolis-min-corrupted": 0.2,
        "propolis-min-dropped": 0,
        "propolis-max-weight": 100,
        "propolis-weight-key": "minutes",
        "propolis-max-norm": 1.5,
        "propolis-max-reveals": 9,
        "propolis-require-malicious": True,
        "propolis-min-bits": 8,
        "propolis-min-density": 0.5,
        "propolis-max-step": 2,
        "propolis-require-encryption": True,
        "propolis-require-masks": True,
        "propolis-max-refused-sums": 7,
        "propolis-max-trainings": 3,
        "propolis-dir": "/somewhere",
        "partition-id": 3,
    }
    assert policy_of(config) == Policy(5, 2, 0.2, 0, 100, "minutes", 1.5, 9, True, 8, 0.5, 2, False, True, True, 7, 3)
    assert policy_of({}) == Policy()
    assert policy_of({}).require_encryption is None
    assert policy_of({"propolis-require-encryption": False}).require_encryption is False
    assert policy_of({"propolis-min-dropped": 0, "propolis-max-norm": 2}).max_norm == 2
    assert policy_of({}).max_reveals_per_model == 4
    assert SIMULATED.max_reveals_per_model is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("propolis-min-cohorts", 5),
        ("propolis-store", "/elsewhere"),
        ("propolis-min-cohort", "5"),
        ("propolis-min-cohort", 5.0),
        ("propolis-min-cohort", True),
        ("propolis-min-cohort", 1),
        ("propolis-max-weight", "all"),
        ("propolis-max-weight", True),
        ("propolis-max-weight", 0),
        ("propolis-max-norm", -1.0),
        ("propolis-max-reveals", 0),
        ("propolis-max-reveals", "many"),
        ("propolis-require-malicious", 1),
        ("propolis-require-encryption", 1),
        ("propolis-require-encryption", "no"),
        ("propolis-require-encryption", None),
        ("propolis-max-reveals", 2.5),
        ("propolis-weight-key", 1),
        ("propolis-require-malicious", "true"),
        ("propolis-min-dropped", 1.0),
    ],
)
def test_a_policy_that_cannot_be_read_is_an_error_and_not_ignored(key: str, value: Any) -> None:
    with pytest.raises(UsageError):
        policy_of({key: value})


def test_whatever_goes_wrong_after_training_counts_like_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a bug of ours: that there is an error says something of the data."""
    from propolis.client import update

    def broken(*_: object) -> None:
        raise KeyError("w")

    monkeypatch.setattr(update, "encode_update", broken)
    hive = Hive(4, policy=Policy(max_reveals_per_model=1), attempts=1)
    for said in ("upload: storage", "upload: reveals"):
        with pytest.raises(TooFewPeersError, match=said):
            hive.round()
