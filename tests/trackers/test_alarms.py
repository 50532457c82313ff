"""Warnings of loss spikes and collapsed routers: given where there is one, and not where there is none."""

import types

import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.trackers.alarms import Alarms, CollapseWatch, SpikeWatch


def told(losses):
    watch = SpikeWatch()
    return [step for step, loss in enumerate(losses, start=1) if watch.warning(step, loss) is not None]


def falling(count):
    """A loss as of a small model: it falls, with noise."""
    steps = np.arange(1, count + 1)
    return 2 + 5 * steps**-0.5 + np.random.default_rng(0).normal(0, 0.05, count)


def test_an_ordinary_run_has_no_spike():
    assert told(falling(3000)) == []


def test_a_spike_is_told_once_and_a_second_one_again():
    losses = falling(500)
    losses[200:203] += [3.0, 4.0, 2.0]
    losses[300] += 1.5
    assert told(losses) == [201, 301]
    message = SpikeWatch()
    for step in range(50):
        assert message.warning(step, 2.0) is None
    assert message.warning(51, 3.25) == "the loss of step 51 jumped to 3.2500, from a median of 2.0000 before it"


def test_a_flat_loss_makes_no_spike_of_nothing():
    assert told([2.0] * 50 + [2.15] + [2.0] * 50) == []


def test_a_loss_that_stays_high_is_told_once_and_becomes_what_others_are_compared_with():
    assert told([2.0] * 50 + [6.0] * 300 + [9.0]) == [51, 351]


def warnings(loads, num_experts=8, top_k=2):
    watch = CollapseWatch(num_experts, top_k)
    return [(step, message) for step, load in enumerate(loads, 1) for message in watch.warnings(step, np.array(load))]


BALANCED, ONE_PAIR = [100] * 8, [0, 0, 400, 0, 0, 398, 2, 0]


def test_a_collapsed_layer_is_told_once_it_has_lasted_and_once_only():
    found = warnings([[BALANCED, BALANCED], *[[BALANCED, ONE_PAIR]] * 10])
    assert [step for step, _ in found] == [4]
    assert (
        "the router of MoE layer 1 has collapsed by step 4: its load is that of 2.0 of 8 experts (2, 5)" in found[0][1]
    )


def test_a_short_collapse_and_an_uneven_load_are_not_told():
    assert warnings([[ONE_PAIR], [ONE_PAIR], [BALANCED]] * 5) == []
    assert warnings([[[300, 200, 100, 100, 50, 25, 15, 10]]] * 10) == []


def test_a_collapse_that_ended_and_came_back_is_told_again():
    assert [step for step, _ in warnings([[ONE_PAIR]] * 3 + [[BALANCED]] + [[ONE_PAIR]] * 3)] == [3, 7]


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 2), (8, 1), (64, 6), (256, 8)])
def test_routing_of_every_size_collapses_onto_top_k_and_not_onto_half(num_experts, top_k):
    onto = [[1000] * top_k + [0] * (num_experts - top_k)]
    half = [[1000] * max(num_experts // 2, top_k + 1) + [10] * (num_experts - max(num_experts // 2, top_k + 1))]
    assert len(warnings([onto] * 5, num_experts, top_k)) == 1
    assert warnings([half] * 5, num_experts, top_k) == []


def test_where_every_token_goes_to_every_expert_there_is_no_collapse():
    assert warnings([[[5, 5]]] * 5, num_experts=2, top_k=2) == []


def test_the_observer_logs_what_both_find_and_compares_no_loss_that_is_not_finite(caplog):
    alarms = Alarms(MoEConfig())
    for step, loss in enumerate([2.0] * 50 + [float("nan"), 6.0], start=1):
        alarms.step_read(step, types.SimpleNamespace(loss=loss, is_finite=loss == loss))
    for step in (10, 20, 30):
        alarms.line(step, {"train/loss": 2.0}, np.array([ONE_PAIR]))
        alarms.line(step, {"val/loss": 2.0, "moe/load": [[0.5, 0.5]]})
    spike, collapse = caplog.messages
    assert spike.startswith("warning: the loss of step 52 jumped to 6.0000")
    assert collapse.startswith("warning: the router of MoE layer 0 has collapsed by step 30")
