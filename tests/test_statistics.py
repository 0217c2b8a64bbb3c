import pytest

from bruno_ray.intervals import wilson_interval


@pytest.mark.parametrize(
    ("successes", "total", "lower", "upper"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_matches_published_values(successes, total, lower, upper):
    assert wilson_interval(successes, total) == pytest.approx((lower, upper), abs=5e-5)


def test_wilson_interval_is_symmetric_and_holds_the_rate():
    for total in (1, 7, 100):
        for successes in range(total + 1):
            lower, upper = wilson_interval(successes, total)
            mirrored = wilson_interval(total - successes, total)
            assert 0.0 <= lower <= successes / total <= upper <= 1.0
            assert (1 - upper, 1 - lower) == pytest.approx(mirrored, abs=1e-12)


def test_wilson_interval_narrows_with_data_and_widens_with_confidence():
    def width(*arguments):
        lower, upper = wilson_interval(*arguments)
        return upper - lower

    assert width(300, 1000) < width(30, 100) < width(3, 10)
    assert width(30, 100, 0.99) > width(30, 100, 0.95) > width(30, 100, 0.8)


def test_wilson_interval_without_data_is_ignorance():
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (1, 0), (1, 5, 1.0), (1, 5, 0.0)])
def test_wilson_interval_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match=r"are impossible|must be between 0 and 1"):
        wilson_interval(*counts)
