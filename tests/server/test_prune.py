"""The schedule, the global mask, and rounds that keep to both."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray
from torch import nn

from harness import Blobs
from propolis.client.app import Participant, make_client_app
from propolis.client.train import LocalTrainer
from propolis.secure.codec.sparsify import pruned_entries
from propolis.secure.errors import UsageError
from propolis.server.app import FederatedRun
from propolis.server.checkpoint import RunState
from propolis.server.model import GlobalModel
from propolis.server.prune import Pruning, smallest
from propolis.settings import Settings
from propolis.simulations.local import LocalGrid

CPU = torch.device("cpu")
STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox")
WEIGHTS = (("0.weight",), ("3.weight",))


def model() -> GlobalModel:
    torch.manual_seed(0)
    return GlobalModel.of(Blobs().model())


def changed(it: GlobalModel, **arrays: NDArray[np.float32]) -> GlobalModel:
    return replace(it, arrays={**it.arrays, **{name.replace("_", "."): array for name, array in arrays.items()}})


def numbers(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def test_the_schedule_is_the_cubic_one() -> None:
    """Zhu and Gupta (2017), equation 1, with s_i = 0, s_f = 0.8, t_0 = 2, n dt = 4."""
    shares = [Pruning(0.8, 3, 6, WEIGHTS).share_after(number) for number in range(1, 9)]
    by_hand = [0.8 + (0.0 - 0.8) * (1 - (t - 2) / 4) ** 3 for t in (3, 4, 5, 6)]
    assert shares == pytest.approx([0, 0, *by_hand, 0.8, 0.8])
    assert shares[5:] == [0.8] * 3
    assert shares == sorted(shares)


def test_a_schedule_of_one_round_prunes_at_once() -> None:
    assert [Pruning(0.5, 2, 2, WEIGHTS).share_after(number) for number in (1, 2, 3)] == [0.0, 0.5, 0.5]


def test_the_mask_has_exactly_as_many_of_the_smallest_as_asked_over_all_arrays() -> None:
    rng = np.random.default_rng(0)
    arrays = [np.abs(rng.normal(size=shape)).astype(np.float32) for shape in ((7, 5), (3, 2, 4), (2, 2))]
    for count in (0, 1, 17, 40):
        masks = smallest(arrays, count)
        assert [mask.shape for mask in masks] == [(7, 5), (3, 2, 4), (2, 2)]
        assert sum(int(mask.sum()) for mask in masks) == count
        taken = np.concatenate([array[mask] for array, mask in zip(arrays, masks, strict=True)])
        assert sorted(taken) == sorted(np.concatenate([array.ravel() for array in arrays]))[:count]


def test_of_equal_entries_the_first_are_taken() -> None:
    masks = smallest([numbers(2, 1, 1), numbers(1, 0.5, 1, 3)], 3)
    assert [mask.tolist() for mask in masks] == [[False, True, True], [False, True, False, False]]


def test_every_array_keeps_its_largest_entry() -> None:
    small, large = numbers(0.1, 0.3, 0.2), numbers(5, 6, 7, 8)
    assert [mask.tolist() for mask in smallest([small, large], 3)] == [[True, False, True], [True] + [False] * 3]
    assert [mask.tolist() for mask in smallest([small, large], 7)] == [[True, False, True], [True] * 3 + [False]]


def test_what_is_zero_is_taken_also_beyond_the_count() -> None:
    assert smallest([numbers(0, 0, 0, 4, 5)], 1)[0].tolist() == [True, True, True, False, False]
    nothing, something = smallest([numbers(0, 0), numbers(1, 2)], 2)
    assert (nothing.all(), something.any()) == (True, False)


def test_entries_of_vectors_are_never_pruned() -> None:
    assert not pruned_entries(np.zeros(3)).any()
    assert pruned_entries(np.array([[0.0, -0.0, 1e-30]])).tolist() == [[True, True, False]]


class Mixed(nn.Module):
    """Every kind of array: a tied matrix, a kernel, biases, a norm, a frozen matrix, a buffer, an empty matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = nn.Linear(3, 3)
        self.again.weight = self.first.weight
        self.kernel = nn.Conv1d(2, 2, 2)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 2))
        self.register_buffer("table", torch.ones(2, 2))


def test_trainable_matrices_and_kernels_are_pruned_and_nothing_else() -> None:
    pruning = Pruning.of(Settings(prune=0.5), Mixed())
    assert pruning is not None
    assert set(pruning.weights) == {("first.weight", "again.weight"), ("kernel.weight",)}
    assert Pruning.of(Settings(prune_end=3), Mixed()) is None
    with pytest.raises(UsageError, match=r"prune is 0\.5, but the model has no trainable array of two dimensions"):
        Pruning.of(Settings(prune=0.5), nn.LayerNorm(3))


def test_tied_weights_count_once_and_the_copy_that_is_loaded_last_decides() -> None:
    it = GlobalModel.of(Mixed())
    first, again = np.full((3, 3), 9, np.float32), np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    it = replace(it, arrays={**it.arrays, "first.weight": first, "again.weight": again})
    pruning = Pruning(0.5, 1, 1, (("first.weight", "again.weight"),))
    pruned = pruning.apply(1, it, it)
    assert pruned.arrays["again.weight"].ravel().tolist() == [0, 0, 0, 0, 5, 6, 7, 8, 9]
    assert pruned.arrays["first.weight"].ravel().tolist() == [0] * 4 + [9] * 5
    assert pruning.sparsity(pruned) == 4 / 9


def test_nothing_is_pruned_before_the_first_round_of_pruning() -> None:
    it = model()
    assert Pruning(0.5, 3, 4, WEIGHTS).apply(2, it, it) is it


def test_only_weights_change_and_they_keep_their_type() -> None:
    it = model()
    pruned = Pruning(0.5, 1, 1, WEIGHTS).apply(1, it, it)
    assert np.count_nonzero(pruned.arrays["0.weight"]) + np.count_nonzero(pruned.arrays["3.weight"]) == 24
    for name, array in it.arrays.items():
        assert pruned.arrays[name].dtype == array.dtype
        if name not in ("0.weight", "3.weight"):
            np.testing.assert_array_equal(pruned.arrays[name], array)


def test_what_was_pruned_stays_so_however_far_a_strategy_has_moved_it() -> None:
    pruning = Pruning(0.5, 1, 1, WEIGHTS)
    before = pruning.apply(1, model(), model())
    moved = changed(before, **{"0_weight": np.where(before.arrays["0.weight"] == 0, 100, before.arrays["0.weight"])})
    after = pruning.apply(2, before, moved)
    np.testing.assert_array_equal(after.arrays["0.weight"], before.arrays["0.weight"])


def test_zeros_of_a_model_that_was_not_pruned_yet_are_like_any_value() -> None:
    """As in a low-rank adapter, whose second matrix starts at zero."""
    start, pruning = model(), Pruning(0.5, 1, 1, WEIGHTS)
    zero = changed(start, **{"0_weight": np.zeros_like(start.arrays["0.weight"])})
    after = pruning.apply(1, zero, start)
    assert after.arrays["0.weight"].any()


class Recording:
    """The masks after each round, and what devices were told."""

    def __init__(self) -> None:
        self.states: list[RunState] = []
        self.told: list[object] = []
        self.revived = 0

    def round_started(self, number: int, attempt: int) -> None:
        pass

    def round_finished(self, state: RunState) -> None:
        self.states.append(state)


def pruned_run(recording: Recording, **changes: object) -> FederatedRun:
    settings = Settings(**{"clients": 3, "rounds": 6, "epochs": 1, "lr": 0.1, **changes})  # type: ignore[arg-type]
    run = FederatedRun(settings, Blobs(), Blobs().data().test, device=CPU)
    trainer, data = LocalTrainer(Blobs(), CPU), Blobs().data().train
    app = make_client_app(lambda _: Participant(trainer, data, data, "everybody"))

    def recorded(message: object, context: object) -> object:
        config = next(iter(message.content.config_records.values()), ConfigRecord())  # type: ignore[attr-defined]
        sent = {name: array.numpy() for name, array in message.content["arrays"].items()}  # type: ignore[attr-defined]
        reply = app(message, context)  # type: ignore[arg-type]
        if "arrays" not in reply.content:  # an evaluation
            return reply
        recording.told.append(config.get("pruned"))
        answered = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        for (name,) in WEIGHTS if config.get("pruned") else ():
            recording.revived += np.count_nonzero(answered[name][pruned_entries(sent[name])])
        return reply

    run.run(LocalGrid(lambda: recorded, settings.clients), recording)  # type: ignore[arg-type, return-value]
    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_with_the_share_and_never_revives_a_weight(strategy: str) -> None:
    recording = Recording()
    run = pruned_run(recording, strategy=strategy, prune=0.5, prune_begin=2, prune_end=4)
    pruning = Pruning(0.5, 2, 4, WEIGHTS)
    assert recording.told == [False] * 6 + [True] * 12
    assert recording.revived == 0
    for number, state in enumerate(recording.states, start=1):
        assert state.history[-1].metrics["sparsity"] == round(pruning.share_after(number) * 48) / 48
    for name in ("0.weight", "3.weight"):
        masks = [pruned_entries(state.model.arrays[name]) for state in recording.states]
        assert all((earlier <= later).all() for earlier, later in pairwise(masks))
    assert run.state.history[-1].accuracy is not None
    assert run.state.history[-1].accuracy > 0.6


def test_devices_hear_nothing_of_pruning_where_there_is_none() -> None:
    recording = Recording()
    run = pruned_run(recording)
    assert set(recording.told) == {None}
    assert "sparsity" not in run.state.history[-1].metrics


def test_a_strategy_with_a_model_of_its_own_goes_on_from_the_pruned_one() -> None:
    """Or FedAvgM would move the zeros by more in every round, until they are infinite."""
    run = pruned_run(Recording(), strategy="fedavgm", prune=0.5, prune_end=1)
    for name, array in run._strategy.current_arrays.items():  # type: ignore[attr-defined]
        np.testing.assert_array_equal(array.numpy(), run.state.model.arrays[name])


def test_the_pruned_model_is_the_one_that_is_evaluated() -> None:
    run = pruned_run(Recording(), prune=0.9, prune_end=1, rounds=1, evaluate_fraction=1.0)
    expected = LocalTrainer(Blobs(), CPU)
    expected.load({name: torch.from_numpy(array) for name, array in run.state.model.arrays.items()})
    (record,) = run.state.history
    assert record.loss == pytest.approx(expected.evaluate(Blobs().data().test)["loss"], rel=1e-6)
    on_devices = expected.evaluate(Blobs().data().train)["loss"]
    assert record.metrics["device-loss"] == pytest.approx(on_devices, rel=1e-6)
