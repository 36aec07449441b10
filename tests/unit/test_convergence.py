"""When a migration stops the devices."""
import pytest

from vfiodma.migration.convergence import Convergence, Step

GIB = 1 << 30


def simulate(size, bandwidth, dirty_rate, working_set, **options):
    """Run rounds over a machine that writes at a steady rate; return the decision, the rounds and the last amount."""
    convergence = Convergence(stopping=0.0, **options)
    left = size
    while True:
        seconds = left / bandwidth
        dirty = int(min(dirty_rate * seconds, working_set))
        convergence.observe(left, seconds, 0.0, dirty)
        left = dirty
        step = convergence.decide(left)
        if step is not Step.CONTINUE:
            return step, convergence, left


def test_an_idle_machine_switches_after_one_round():
    step, convergence, left = simulate(4 * GIB, GIB, 0, 0)
    assert (step, convergence.rounds, left) == (Step.SWITCH, 1, 0)
    assert convergence.predicted == 0


def test_rounds_go_on_below_the_limit_while_they_shrink():
    step, convergence, left = simulate(4 * GIB, GIB, 0.1 * GIB, 0.2 * GIB, downtime_limit=0.3)
    assert step is Step.SWITCH
    assert convergence.predicted <= convergence.floor
    assert convergence.rounds <= 5


def test_a_working_set_that_fits_the_limit_ends_without_all_rounds():
    step, convergence, left = simulate(4 * GIB, GIB, 10 * GIB, 0.1 * GIB, downtime_limit=0.3, max_rounds=30)
    assert step is Step.SWITCH and convergence.rounds == 2
    assert convergence.predicted == pytest.approx(0.1)


def test_a_machine_that_writes_faster_than_the_stream_ends_at_max_rounds():
    step, convergence, left = simulate(4 * GIB, GIB, 2 * GIB, 2 * GIB, max_rounds=7)
    assert (step, convergence.rounds) == (Step.FORCED, 7)
    assert convergence.hopeless
    assert convergence.predicted > 0.3


def test_the_last_round_switches_when_it_fits():
    step, convergence, _ = simulate(4 * GIB, GIB, 0.1 * GIB, GIB, max_rounds=2)
    assert step is Step.SWITCH and convergence.rounds == 2


def test_the_prediction_keeps_a_margin():
    convergence = Convergence(downtime_limit=0.1, margin=0.25, floor=1.0, stopping=0.0)
    convergence.observe(GIB, 1.0, 0.0, 0)
    assert convergence.decide(int(0.09 * GIB)) is Step.CONTINUE
    convergence.observe(GIB, 1.0, 0.0, 0)
    assert convergence.decide(int(0.08 * GIB) - 1) is Step.SWITCH


def test_fixed_costs_count():
    convergence = Convergence(downtime_limit=0.1)
    convergence.observe(GIB, 1.0, 0.2, 0)
    assert convergence.decide(0) is Step.CONTINUE
    assert convergence.predicted == pytest.approx(0.2 + convergence.stopping)


def test_short_rounds_hardly_change_the_bandwidth():
    convergence = Convergence()
    convergence.observe(GIB, 1.0, 0.0, 0)
    convergence.observe(4096, 0.001, 0.0, 0)
    assert convergence.bandwidth == pytest.approx(GIB, rel=0.01)


def test_without_a_measurement_nothing_is_predicted():
    assert Convergence().predict(1) == float("inf")
    assert Convergence(stopping=0.01).predict(0) == 0.01
