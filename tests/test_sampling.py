import numpy as np

from fd3d.data.sampling import class_balanced


def _imbalanced(frames: int = 400) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.uniform(size=(frames, 10)) < np.linspace(0.95, 0.02, 10)


def test_rare_classes_are_met_more_often_than_in_the_frames():
    present = _imbalanced()
    drawn = class_balanced(present, rng=np.random.default_rng(0))
    before = present[:, -1].mean()
    after = present[drawn, -1].mean()
    assert after > 3 * before


def test_every_class_gets_its_tenth_of_the_draws_from_frames_that_hold_it():
    present = _imbalanced()
    drawn = class_balanced(present, rng=np.random.default_rng(0))
    each = int(present.sum() / 10)
    assert abs(len(drawn) - 10 * each) <= 10
    assert present[drawn[: each - 1], 0].all()
    assert present[drawn[-(each - 1) :], 9].all()


def test_same_seed_same_frames_and_other_seed_others():
    present = _imbalanced()
    first, again, other = (
        class_balanced(present, rng=np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_class_that_no_frame_holds_is_left_out():
    present = _imbalanced()
    present[:, 4] = False
    drawn = class_balanced(present, rng=np.random.default_rng(0))
    assert len(drawn) > 0
    assert len(class_balanced(np.zeros((5, 10), bool), rng=np.random.default_rng(0))) == 0
