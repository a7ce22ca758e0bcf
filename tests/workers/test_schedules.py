import pytest

from ngd_workers.contract.spec import Schedule
from ngd_workers.train.schedules import lr_factor, total_steps


def factors(total: int = 10, **settings: object) -> list[float]:
    schedule = Schedule.model_validate({"steps": total} | settings)
    return [lr_factor(schedule, step, total) for step in range(1, total + 1)]


def test_constant_lr_stays():
    assert factors() == [1.0] * 10


def test_warmup_rises_linearly_from_one_share_to_the_whole():
    assert factors(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_polynomial_starts_whole_and_would_reach_zero_after_the_last_step():
    linear = factors(lr={"kind": "polynomial"})

    assert linear == pytest.approx([1 - step / 10 for step in range(10)])


def test_polynomial_decays_only_between_its_fractions():
    decayed = factors(lr={"kind": "polynomial", "power": 2.0, "start_fraction": 0.2, "end_fraction": 0.7})

    assert decayed == pytest.approx([1, 1, 1, 0.64, 0.36, 0.16, 0.04, 0, 0, 0])


def test_warmup_multiplies_decay():
    assert factors(total=4, warmup_steps=2, lr={"kind": "polynomial"}) == pytest.approx([0.5, 0.75, 0.5, 0.25])


def test_length_is_steps_or_epochs():
    assert total_steps(Schedule(steps=7), steps_per_epoch=5) == 7
    assert total_steps(Schedule(epochs=3), steps_per_epoch=5) == 15
