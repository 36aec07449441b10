"""When a migration stops the devices."""
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiodma.errors import InvalidArgumentError
from vfiodma.migration.convergence import Convergence, Costs, Policy, Sample, Step, forecast

GIB, MIB = 1 << 30, 1 << 20
FIXED, ACKNOWLEDGEMENT, SCAN = 0.0005, 0.0003, 0.0008


class Guest:
    """A model guest, link and engine: a working set that is written at random, a bandwidth with noise."""

    def __init__(self, size=4 * GIB, bandwidth=4 * GIB, rate=GIB, working_set=64 * MIB, noise=0.0, seed=0, **policy):
        self.bandwidth, self.rate, self.working_set, self.left, self.noise = bandwidth, rate, working_set, size, noise
        self.random = random.Random(seed)
        self.convergence = Convergence(Policy(**policy), Costs(stop=0.002))
        self.elapsed, self.slowed, self.decisions = 0.0, 0.0, []

    def written(self, seconds):
        seconds *= 1 - self.slowed
        return self.working_set * -math.expm1(-self.rate * seconds / self.working_set) if self.working_set else 0.0

    def seconds(self, nbytes):
        return (FIXED + nbytes / self.bandwidth) * math.exp(self.random.gauss(0, self.noise))

    def round(self):
        sending = self.seconds(self.left)
        interval = sending + ACKNOWLEDGEMENT + SCAN
        self.left = int(self.written(interval))
        self.elapsed += interval
        self.interval = interval
        self.convergence.observe(Sample(round(sending * self.bandwidth), sending, self.left,
                                        acknowledgement=ACKNOWLEDGEMENT, scan=SCAN))
        self.decisions.append(self.convergence.decide(self.elapsed))
        self.slowed = self.decisions[-1].throttle
        return self.decisions[-1]

    def run(self):
        while (decision := self.round()).step is Step.CONTINUE:
            assert len(self.decisions) < 10_000
        return decision

    def downtime(self):
        """Stop, harvest, send; devices stop one after the other."""
        last = self.written(self.interval + 0.002 / 2)
        return 0.002 + SCAN + self.seconds(last) + ACKNOWLEDGEMENT


def test_an_idle_machine_switches_after_one_round():
    guest = Guest(rate=0, working_set=0)
    assert guest.run().step is Step.SWITCH
    assert len(guest.decisions) == 1 and guest.left == 0
    assert guest.decisions[0].prediction.total == pytest.approx(0.002 + SCAN + ACKNOWLEDGEMENT)


def test_rounds_go_on_below_the_limit_while_they_shrink():
    guest = Guest(bandwidth=GIB, rate=0.1 * GIB, working_set=0.2 * GIB, downtime_limit=0.3)
    decision = guest.run()
    assert decision.step is Step.SWITCH and decision.prediction.total < 0.006
    assert len(guest.decisions) <= 5


def test_a_working_set_that_fits_the_limit_ends_without_all_rounds():
    guest = Guest(bandwidth=GIB, rate=10 * GIB, working_set=0.1 * GIB, downtime_limit=0.3, max_rounds=30)
    decision = guest.run()
    assert decision.step is Step.SWITCH and len(guest.decisions) == 2
    assert decision.prediction.total == pytest.approx(0.1, rel=0.1)


def test_a_machine_that_writes_faster_than_the_stream_ends_at_max_rounds():
    guest = Guest(bandwidth=GIB, rate=20 * GIB, working_set=2 * GIB, max_rounds=7)
    decision = guest.run()
    assert decision.step is Step.FORCED and len(guest.decisions) == 7
    assert decision.prediction.total > 0.3 and decision.stalled
    assert not guest.convergence.forecast().converges


def test_the_last_round_switches_when_it_fits():
    guest = Guest(bandwidth=GIB, rate=0.1 * GIB, working_set=GIB, max_rounds=2, downtime_limit=0.3)
    assert guest.run().step is Step.SWITCH and len(guest.decisions) == 2


def test_the_prediction_keeps_a_margin():
    for left, step in ((0.09, Step.CONTINUE), (0.079, Step.SWITCH)):
        convergence = Convergence(Policy(downtime_limit=0.1, margin=0.25, floor=1.0), Costs(stop=0.0))
        convergence.observe(Sample(GIB, 1.0, int(left * GIB)))
        assert convergence.decide().step is step


def test_fixed_costs_count():
    convergence = Convergence(Policy(downtime_limit=0.1), Costs(device_bytes=GIB // 10, apply=0.01, start=0.02))
    convergence.observe(Sample(GIB, 1.0, 0, acknowledgement=0.05, scan=0.15))
    decision = convergence.decide()
    assert decision.step is Step.CONTINUE
    parts = decision.prediction.breakdown
    assert (parts.stop, parts.scan, parts.send, parts.acknowledgement) == (0.0005, 0.15, 0.0, 0.05)
    assert parts.device_state == pytest.approx(0.1) and parts.total == pytest.approx(0.3305)


def test_short_rounds_hardly_change_the_bandwidth_but_tell_the_fixed_cost():
    convergence = Convergence()
    convergence.observe(Sample(GIB, 1.0, 4096))
    convergence.observe(Sample(4096, 0.001, 0))
    assert convergence.bandwidth == pytest.approx(GIB, rel=0.01)
    assert convergence.link.seconds(8192) == pytest.approx(0.001, rel=0.05)
    assert convergence.link.seconds(GIB / 2) == pytest.approx(0.5, rel=0.05)


def test_one_slow_round_does_not_spoil_the_line():
    convergence = Convergence()
    for index, mib in enumerate((1024, 64, 60, 70, 62, 66)):
        slow = 5 if index == 3 else 1
        convergence.observe(Sample(mib * MIB, slow * mib / 1024, 64 * MIB))
    assert convergence.link.seconds(64 * MIB) == pytest.approx(64 / 1024, rel=0.15)


def test_final_rounds_are_as_fast_as_those_that_devices_disturbed_least():
    convergence = Convergence()
    for mib, gib_a_second in ((256, 1.0), (60, 2.0), (30, 1.2), (28, 2.0), (26, 1.1)):
        convergence.observe(Sample(mib * MIB, mib / 1024 / gib_a_second, 26 * MIB))
    assert convergence.link.seconds(26 * MIB, quiet=True) == pytest.approx(26 / 1024 / 2, rel=0.01)
    assert convergence.link.seconds(26 * MIB) > 26 / 1024 / 1.7


def test_waits_for_a_cpu_are_no_part_of_final_rounds():
    convergence = Convergence()
    for mib in (256, 60, 30, 28, 26):
        convergence.observe(Sample(mib * MIB, mib / 1024, 26 * MIB, waited=mib / 1024 / 4))
    assert convergence.link.seconds(26 * MIB, quiet=True) == pytest.approx(26 / 1024 * 3 / 4, rel=0.01)
    assert convergence.link.seconds(26 * MIB) == pytest.approx(26 / 1024, rel=0.01)
    convergence.observe(Sample(26 * MIB, 26 / 1024, 26 * MIB, waited=math.inf))
    assert convergence.link.seconds(26 * MIB, quiet=True) > 0


def test_zero_pages_of_the_first_round_are_not_taken_for_fixed_costs():
    convergence = Convergence()
    convergence.observe(Sample(1 << 20, 0.4, 64 * MIB, content_bytes=MIB, zero_bytes=4 * GIB))
    assert convergence.predict().total < 0.1


def test_without_a_measurement_nothing_is_predicted():
    convergence = Convergence(costs=Costs(stop=0.01))
    assert convergence.predict().total == 0.01
    with pytest.raises(InvalidArgumentError):
        convergence.forecast()


def test_the_working_set_is_found_from_rounds_of_several_lengths():
    convergence = Convergence()
    guest = Guest(working_set=64 * MIB, rate=GIB)
    for seconds in (1.0, 0.02, 0.01, 0.05):
        convergence.observe(Sample(GIB, seconds, int(guest.written(seconds)), interval=seconds))
    assert convergence.working_set.size == pytest.approx(64 * MIB, rel=0.1)
    assert convergence.working_set.rate == pytest.approx(GIB, rel=0.1)
    for seconds in (0.005, 0.03, 0.2, 10):
        assert convergence.working_set.unique(seconds) == pytest.approx(guest.written(seconds), rel=0.1)


@pytest.mark.parametrize("bandwidth", [GIB, 4 * GIB])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_downtimes_are_predicted_within_15_percent(bandwidth, noise):
    off = []
    for seed in range(30):
        guest = Guest(bandwidth=bandwidth, noise=noise, seed=seed, downtime_limit=0.1)
        predicted = guest.run().prediction.total
        off.append(abs(predicted / guest.downtime() - 1))
    assert sorted(off)[len(off) // 2] <= 0.15


def test_the_limit_rises_to_its_maximum_and_not_beyond():
    guest = Guest(bandwidth=GIB, rate=20 * GIB, working_set=0.2 * GIB, max_rounds=60, downtime_limit=0.05,
                  downtime_max=0.4)
    decision = guest.run()
    limits = [decision.limit for decision in guest.decisions]
    assert limits == sorted(limits) and limits[0] == 0.05 and limits[-1] <= 0.4
    assert decision.step is Step.SWITCH and decision.prediction.total <= limits[-1]


@pytest.mark.parametrize("on_timeout, step", [("force", Step.FORCED), ("cancel", Step.CANCEL),
                                              ("ignore", Step.FORCED)])
def test_when_the_time_is_over_it_does_what_was_asked_for(on_timeout, step):
    guest = Guest(bandwidth=GIB, rate=20 * GIB, working_set=2 * GIB, max_rounds=12, timeout=9.0, on_timeout=on_timeout)
    assert guest.run().step is step
    assert len(guest.decisions) >= 11 if on_timeout == "ignore" else 9 <= guest.elapsed < 12


def test_an_oscillation_is_left_at_its_minimum():
    convergence = Convergence(Policy(max_rounds=40, downtime_limit=0.01), Costs())
    steps = []
    for index in range(40):
        left = (400, 100, 300, 200)[index % 4] * MIB
        convergence.observe(Sample(256 * MIB, 0.25, left))
        steps.append(convergence.decide(index))
        if steps[-1].step is not Step.CONTINUE:
            break
    assert steps[-1].step is Step.FORCED and steps[-1].stalled and left == 100 * MIB
    assert 35 <= len(steps) < 40


def test_the_guest_is_slowed_down_step_by_step_until_it_converges():
    guest = Guest(bandwidth=GIB, rate=2 * GIB, working_set=3 * GIB, max_rounds=60, throttle_max=0.9)
    decision = guest.run()
    factors = [decision.throttle for decision in guest.decisions]
    assert factors == sorted(factors) and 0.2 in factors and factors[-1] <= 0.9
    assert decision.step is Step.SWITCH


@pytest.mark.parametrize("wrong", [{"downtime_limit": 0}, {"max_rounds": 0}, {"downtime_limit": math.nan},
                                   {"on_timeout": "explode"}, {"downtime_limit": 2.0, "downtime_max": 1.0},
                                   {"throttle_max": 1.0}, {"timeout": -1.0}, {"margin": math.inf}])
def test_a_policy_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        Policy(**wrong)


def test_a_forecast_says_why_it_will_not_converge():
    assert forecast(64e9, 2.1e9, 3.1e9).text.startswith("will not converge: dirty 3.1 GB/s > link 2.1 GB/s; ")
    assert forecast(64e9, 2.1e9, 3.1e9, working_set=0.2e9).converges
    assert forecast(64e9, 2.1e9, 0).converges
    assert "do not depend on memory" in forecast(1e9, 2e9, 0, fixed=0.5).text
    assert not forecast(1e9, 0, 1e9).converges and "endless" in forecast(1e9, 0, 1e9).text


ANY = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1e12) | st.sampled_from([0.0, -1.0, 1e-300])
SIZES = st.integers(-(1 << 70), 1 << 70) | st.integers(0, 1 << 34)
SAMPLES = st.builds(Sample, SIZES, ANY, SIZES, ANY, st.none() | SIZES, SIZES, ANY, ANY)
POLICIES = st.builds(
    Policy, st.floats(1e-6, 10), st.integers(1, 12), st.sampled_from([0.0, 20.0]), st.integers(1, 5), st.integers(1, 3),
    st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 5.0]), st.sampled_from(["force", "cancel", "ignore"]),
    throttle_max=st.sampled_from([0.0, 0.99]))
COSTS = st.builds(Costs, ANY, SIZES, ANY, ANY, ANY, ANY)


@given(POLICIES, COSTS, st.lists(SAMPLES, min_size=12, max_size=12), st.lists(ANY, min_size=12, max_size=12))
def test_any_numbers_end_within_max_rounds_and_never_switch_above_the_limit(policy, costs, samples, clock):
    convergence = Convergence(policy, costs)
    for sample, elapsed in zip(samples, clock, strict=True):
        convergence.observe(sample)
        decision = convergence.decide(elapsed)
        prediction = decision.prediction
        assert 0 <= prediction.low <= prediction.total <= prediction.high
        assert all(value >= 0 for value in vars(prediction.breakdown).values())
        assert policy.downtime_limit <= decision.limit <= policy.last_limit * (1 + 1e-9)
        assert 0 <= decision.throttle <= policy.throttle_max
        found = convergence.forecast()
        assert found.bandwidth >= 0 and found.dirty_rate >= 0 and found.downtime >= 0 and found.left >= 0
        assert "nan" not in found.text
        if decision.step is Step.SWITCH:
            assert prediction.total <= decision.limit
        if decision.step in (Step.FORCED, Step.CANCEL):
            assert prediction.total > decision.limit
            assert (decision.step is Step.CANCEL) == (policy.on_timeout == "cancel")
        if decision.step is not Step.CONTINUE:
            break
    else:
        raise AssertionError("it goes on for ever")
    assert convergence.rounds <= policy.max_rounds


@given(ANY, ANY, ANY, ANY, ANY, ANY)
def test_forecasts_of_any_numbers_have_an_answer(size, bandwidth, rate, working_set, limit, fixed):
    found = forecast(size, bandwidth, rate, working_set, downtime_limit=limit, fixed=fixed)
    assert found.downtime >= 0 and found.seconds >= 0 and "nan" not in found.text
    assert found.converges == (found.downtime <= found.limit)


@given(st.floats(1e8, 1e10), st.floats(0, 1e10), st.floats(1e6, 4e9), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_a_switch_of_a_model_guest_keeps_its_limit_or_is_marked(bandwidth, rate, working_set, limit, seed):
    guest = Guest(bandwidth=bandwidth, rate=rate, working_set=working_set, downtime_limit=limit, seed=seed, noise=0.02)
    decision = guest.run()
    if decision.step is Step.SWITCH:
        assert guest.downtime() <= limit * 1.25


def test_after_one_round_it_is_open_until_an_interval_of_another_length_is_seen():
    guest = Guest(bandwidth=GIB, rate=10 * GIB, working_set=0.6 * GIB, downtime_limit=0.3)
    guest.round()
    found = guest.convergence.forecast()
    assert found.converges is None and found.text.startswith("open: ")
    guest.convergence.observe_writes(0.01, int(guest.written(0.01)))
    assert guest.convergence.forecast().converges is False
    idle = Guest(rate=MIB, working_set=MIB)
    idle.round()
    assert idle.convergence.forecast().converges
