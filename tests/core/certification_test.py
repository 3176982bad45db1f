"""Randomised smoothing: halfspaces, whose certificates are known, and rules of stopping, all cases.

For a halfspace at distance d, noise of standard deviation sigma leaves the class with probability
Phi(-d / sigma), and the smoothed classifier's radius is d itself.
"""

import collections
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import markdown
import numpy as np
import pytest
from scipy import stats

from jaxrobust import certification, parallel, statistics
from jaxrobust._validate import InputError
from jaxrobust.certification import Certificate, certify, count_labels

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"
KEY = jax.random.key(0)
SIGMA = 0.25


def halfspace(images):
    """Class 1 where the image is brighter than grey; the distance is 2 (brightness - 1/2)."""
    return (images.sum(axis=(1, 2, 3)) > 2).astype(int)


def at_distances(distances):
    """Images [B, 2, 2, 1] at these signed distances from the boundary of :func:`halfspace`."""
    flat = 0.5 + np.asarray(distances, np.float32) / 2
    return np.broadcast_to(flat[:, None, None, None], (len(flat), 2, 2, 1))


DIRECTIONS = jnp.asarray(np.random.default_rng(0).normal(size=(12, 300)), jnp.float32)
IMAGES = np.random.default_rng(1).uniform(size=(5, 2, 2, 3)).astype(np.float32)


def many_classes(images):
    """Classes 200 to 499."""
    return 200 + jnp.argmax(images.reshape(len(images), -1) @ DIRECTIONS, axis=1)


def settings(n, **options):
    return {"sigma": SIGMA, "n0": 20, "n": n, "alpha": 0.01} | options


def test_many_draws_certify_almost_the_distance_of_a_halfspace():
    distances = np.array([0.1, 0.3, -0.2])
    found = certify(halfspace, at_distances(distances), KEY,
                    **settings(100_000, n0=100, alpha=1e-4, batch_size=25_000))
    np.testing.assert_array_equal(found.label, [1, 1, 0])
    assert (found.radius <= np.abs(distances)).all()
    np.testing.assert_allclose(found.radius, np.abs(distances), rtol=0.04)
    np.testing.assert_array_equal(found.num_draws, 100_100)


def test_certificates_are_wrong_as_often_as_the_binomial_law_says_and_at_most_alpha():
    repetitions, n, alpha, distance = 500, 100, 0.1, 0.2
    right = stats.norm.cdf(distance / SIGMA)
    too_many = next(hits for hits in range(n + 1) if (certification.certified_radius(
        hits, n, sigma=SIGMA, alpha=alpha) or 0) > distance)
    expected = stats.binom.sf(too_many - 1, n, right)
    assert 0.05 < expected <= alpha
    found = certify(halfspace, at_distances(np.full(repetitions, distance)), KEY,
                    **settings(n, n0=50, alpha=alpha))
    wrong = np.sum((found.label == 0) | (found.radius > distance))
    low, high = stats.binom.interval(1 - 1e-4, repetitions, expected)
    assert low <= wrong <= high


def test_predictions_are_wrong_at_most_as_often_as_promised():
    repetitions, alpha = 300, 0.2
    found = certification.predict(halfspace, at_distances(np.full(repetitions, 0.01)), KEY,
                                  sigma=SIGMA, n=60, alpha=alpha)
    assert 0 < np.sum(found.label == 0) <= stats.binom.ppf(1 - 1e-4, repetitions, alpha / 2)
    assert np.sum(found.label == 1) > np.sum(found.label == 0)
    sure = certification.predict(halfspace, at_distances([0.3, -0.3]), KEY, sigma=SIGMA, n=60,
                                 alpha=alpha)
    np.testing.assert_array_equal(sure.label, [1, 0])


def test_radii_are_those_of_clopper_and_pearson():
    for hits, n, alpha in ((60, 80, 0.05), (100, 100, 0.001), (990, 1000, 0.001)):
        lower = stats.beta.ppf(alpha, hits, n - hits + 1)
        assert certification.certified_radius(hits, n, sigma=0.5, alpha=alpha) == pytest.approx(
            0.5 * stats.norm.ppf(lower), rel=1e-9)
    # 100 of 100 at alpha: p^100 = alpha.
    assert certification.certified_radius(100, 100, sigma=1, alpha=0.001) == pytest.approx(
        stats.norm.ppf(0.001 ** 0.01))
    assert certification.certified_radius(0, 10, sigma=1, alpha=0.01) is None
    for n, alpha in ((20, 0.05), (99, 0.001), (1000, 0.001)):
        least = certification._least_hits(n, alpha)
        radius = functools.partial(certification.certified_radius, n=n, sigma=1, alpha=alpha)
        assert radius(least - 1) is None and radius(least) >= 0
        # The bound is 1/2 or more where a fair coin gives as many with a probability of <= alpha.
        assert stats.binom.sf(least - 1, n, 0.5) <= alpha < stats.binom.sf(least - 2, n, 0.5)


@pytest.mark.parametrize("options", [
    {"batch_size": 1}, {"batch_size": 17}, {"batch_size": 1000},
    {"batch_size": 16, "layout": parallel.make_layout("mesh")},
    {"batch_size": 3, "layout": parallel.make_layout("pmap", jax.devices()[:2])}])
def test_batches_and_devices_make_no_difference(options):
    expected = certify(many_classes, IMAGES, KEY, **settings(100, sigma=0.1))
    assert expected.label.max() > 255 and (expected.radius > 0).any()
    found = certify(many_classes, IMAGES, KEY, **settings(100, sigma=0.1, **options))
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(found.radius, expected.radius)
    answers = [certification.predict(
        many_classes, IMAGES, KEY, sigma=0.3, n=50, alpha=0.05, **given) for given in ({}, options)]
    np.testing.assert_array_equal(answers[0].label, answers[1].label)


def test_an_images_noise_is_its_own_wherever_it_comes():
    whole = certify(many_classes, IMAGES, KEY, **settings(60))
    parts = [certify(many_classes, IMAGES[[i]], KEY, indices=[i], **settings(60))
             for i in range(len(IMAGES))]
    resumed = Certificate(*map(np.concatenate, zip(*parts, strict=True)))
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    other = count_labels(many_classes, IMAGES[0], KEY, 0, 60, sigma=SIGMA, index=1)
    assert other != count_labels(many_classes, IMAGES[0], KEY, 0, 60, sigma=SIGMA)


def test_counts_of_parts_add_up_to_the_exact_counts_of_all():
    whole = count_labels(many_classes, IMAGES[0], KEY, 0, 120, sigma=SIGMA)
    assert whole.total() == 120 and len(whole) > 3
    parts = collections.Counter()
    for start, num, batch_size in ((0, 50, 7), (50, 1, 3), (51, 69, 69)):
        parts += count_labels(many_classes, IMAGES[0], KEY, start, num, batch_size, sigma=SIGMA)
    assert parts == whole


def test_answers_are_those_of_all_draws():
    images, alpha, n = at_distances(np.linspace(-0.15, 0.15, 12)), 0.05, 90
    certificate = certify(halfspace, images, KEY, **settings(n, alpha=alpha, batch_size=10))
    prediction = certification.predict(halfspace, images, KEY, sigma=SIGMA, n=n, alpha=alpha,
                                       batch_size=10)
    for i, image in enumerate(images):
        count = functools.partial(count_labels, halfspace, image, KEY, sigma=SIGMA, index=i)
        best = max(range(2), key=count(0, 20).__getitem__)
        radius = certification.certified_radius(count(20, n)[best], n, sigma=SIGMA, alpha=alpha)
        assert certificate.label[i] == (best if radius is not None else -1)
        assert certificate.radius[i] == (radius or 0)
        counts = count(0, n)
        is_significant = stats.binomtest(counts[0], n).pvalue <= alpha
        assert prediction.label[i] == (max(counts, key=counts.get) if is_significant else -1)
    abstained = certificate.label == -1
    assert abstained.any() and not abstained.all()
    assert (certificate.num_draws[~abstained] == n + 20).all()
    assert certificate.num_draws[abstained].min() < n + 20
    # Some of either kind are certain before the end.
    for label in (-1, 1):
        assert prediction.num_draws[prediction.label == label].min() < n


LABELS = (-1, 0, 1)


def test_no_further_label_changes_an_answer_that_is_given_early():
    n, alpha, early = 6, 0.25, collections.Counter()
    for labels in itertools.product(LABELS, repeat=n):
        label, drawn = certification._significant_label(
            (np.array([label]) for label in labels), n, alpha)
        (first, most), (_, second) = sorted(
            [(one, labels.count(one)) for one in LABELS], key=lambda pair: -pair[1])[:2]
        ahead = most > second and stats.binomtest(most, most + second).pvalue <= alpha
        assert label == (first if ahead else -1)
        early[label] += drawn < n
    assert all(early[label] for label in LABELS)


def test_no_further_label_certifies_a_class_that_is_given_up_early():
    n, early = 6, 0
    for least, labels in itertools.product((4, 6, 7), itertools.product((0, 1), repeat=n)):
        label, hits, drawn = certification._certified_hits(
            [np.array([1])], (np.array([label]) for label in labels), n, least)
        assert label == (1 if sum(labels) >= least else -1)
        assert label == -1 or (hits, drawn) == (sum(labels), n + 1)
        early += drawn < n + 1
    assert early > 100


def test_of_equally_frequent_classes_that_of_lowest_number_is_tested():
    label, hits, _ = certification._certified_hits(
        [np.array([5, 2, 7, 5]), np.array([2])], [np.array([2, 5, 2])], 3, 2)
    assert (label, hits) == (2, 2)
    assert certification._significant_label([np.array([5, 2, 2, 5])], 4, 0.9) == (-1, 4)


def test_noise_has_the_standard_deviation_asked_for_and_is_not_clipped():
    def is_inside(images):
        return jnp.all((images >= 0) & (images <= 1), axis=(1, 2, 3)).astype(int)

    image = np.array([0, 0.5, 1], np.float32)[None, :, None]
    n = 20_000
    counts = count_labels(is_inside, image, KEY, 0, n, n, sigma=0.5)
    share = (stats.norm.cdf(2) - 0.5) ** 2 * (stats.norm.cdf(1) - stats.norm.cdf(-1))
    assert counts[1] / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_stored_bytes_are_floats_over_255():
    stored = np.full((2, 2, 1), 150, np.uint8)
    assert count_labels(halfspace, stored, KEY, 0, 90, sigma=SIGMA) == count_labels(
        halfspace, np.float32(stored) / 255, KEY, 0, 90, sigma=SIGMA)


def test_draws_without_a_class_count_against_every_class():
    def dark_is_unknown(images):
        return jnp.where(images[:, 0, 0, 0] < 0, -1, 3)

    images = np.array([0.2, 0.0], np.float32)[:, None, None, None]
    found = certify(dark_is_unknown, images, KEY, **settings(200))
    counts = count_labels(dark_is_unknown, images[0], KEY, 20, 200, sigma=SIGMA)
    assert 20 < counts[-1] == 200 - counts[3]
    assert found.label.tolist() == [3, -1]
    assert found.radius[0] == certification.certified_radius(
        counts[3], 200, sigma=SIGMA, alpha=0.01) > 0 == found.radius[1]

    def not_finite(images):
        logits = jnp.log(images[:, 0, 0] * 0 - 1)
        return jnp.where(jnp.isfinite(logits).all(axis=1), jnp.argmax(logits, axis=1), -1)

    nothing = certify(not_finite, images, KEY, **settings(200))
    assert nothing.label.tolist() == [-1, -1] and nothing.num_draws.tolist() == [20, 20]
    assert certification.predict(not_finite, images, KEY, sigma=1, n=50, alpha=0.1).label.tolist(
    ) == [-1, -1]


def test_parameters_and_strengths_are_no_part_of_the_program():
    def above(threshold, images):
        return (images.mean(axis=(1, 2, 3)) > threshold).astype(int)

    certification._classify.clear_cache()
    counts = [count_labels(jax.tree_util.Partial(above, threshold), IMAGES[i], KEY, start, 30,
                           sigma=sigma, index=i)
              for threshold, sigma, i, start in ((0.0, 0.1, 0, 0), (1.0, 0.2, 1, 5))]
    assert counts == [{1: 30}, {0: 30}]
    assert certification._classify._cache_size() == 1


def test_certified_accuracy_counts_abstentions_as_wrong():
    certificate = Certificate(np.array([0, 1, -1, 2]), np.array([0.5, 0.2, 0, 0]), np.full(4, 9))
    found = certification.certified_accuracy(
        certificate, np.array([0, 1, 2, 2]), np.array([0, 0.1, 0.2, 0.5, 0.6]))
    np.testing.assert_array_equal(found, [0.75, 0.5, 0.5, 0.25, 0])
    wrong = certification.certified_accuracy(certificate, np.array([1, 0, 0, 0]), np.array([0]))
    np.testing.assert_array_equal(wrong, [0])


def test_the_sign_test_is_exact():
    assert statistics.sign_test(7, 0) == 2 * 0.5**7
    assert [statistics.sign_test(*pair) for pair in ((3, 4), (4, 3), (2, 2))] == [1, 1, 1]
    assert statistics.sign_test(60, 40) == pytest.approx(2 * stats.binom.sf(59, 100, 0.5))


def test_the_example_of_the_page_runs():
    def logits_fn(images):
        return jnp.stack([images.mean(axis=(1, 2, 3)), jnp.full(len(images), 0.5)], axis=1)

    names = {"logits_fn": logits_fn, "images": at_distances([0.3]), "labels": np.array([0])}
    exec(markdown.program(PAGE.read_text(), "Certificates"), names)
    assert names["certificate"].label == [0] and names["certificate"].num_draws == [100_100]
    assert 0.29 < names["certificate"].radius[0] < 0.31


def certified(classify=halfspace, images=IMAGES, n=50, **options):
    return certify(classify, images, KEY, **settings(n, **options))


@pytest.mark.parametrize("call, message", [
    (lambda: certified(sigma=0.0), "Expected sigma=0.0 in"),
    (lambda: certified(n0=0), "Expected n0=0"),
    (lambda: certified(n=2.5), "Expected n=2.5"),
    (lambda: certified(alpha=1.0), "Expected alpha=1.0"),
    (lambda: certified(n=9, alpha=0.001), "Expected n=9 to be larger.*abstains at alpha=0.001"),
    (lambda: certified(batch_size=0), "batch_size=0"),
    (lambda: certified(images=2 * IMAGES), r"Expected image_batch with values in \[0, 1\]"),
    (lambda: certified(images=IMAGES[0]), r"Expected image_batch of shape \[N, H, W"),
    (lambda: certified(images=IMAGES[:0]), "no size 0"),
    (lambda: certified(indices=[0, 1]), "Expected indices of shape"),
    (lambda: certified(indices=[0, 1, 2, 3, -4]), "Expected indices in .*got -4 at index 4"),
    (lambda: certified(lambda images: images.sum(axis=(1, 2, 3))),
     "Expected labels of the classifier of an integer dtype, got float32"),
    (lambda: certified(lambda images: jnp.zeros((len(images), 3), int)),
     "Expected labels of the classifier of shape"),
    (lambda: certified(lambda images: jnp.full(len(images), -2)),
     "Expected labels of the classifier to be -1 or more, got -2"),
    (lambda: certification.predict(halfspace, IMAGES, KEY, sigma=1, n=7, alpha=0.01),
     "Expected n=7 to be larger"),
    (lambda: count_labels(halfspace, IMAGES[0], KEY, -1, 5, sigma=1), "start=-1"),
    (lambda: count_labels(halfspace, IMAGES[0], KEY, 0, 0, sigma=1), "num=0"),
    (lambda: certification.certified_radius(4, 3, sigma=1, alpha=0.1), "hits=4"),
    (lambda: certification.certified_accuracy(certified(), np.full(5, -1), [0]),
     "Expected labels in .*got -1"),
    (lambda: certification.certified_accuracy(certified(), np.zeros(4, int), [0]),
     "labels of shape"),
    (lambda: certification.certified_accuracy(certified(), np.zeros(5, int), [-1]), "radius=-1"),
    (lambda: statistics.sign_test(0, 0), "number of cases=0"),
    (lambda: statistics.sign_test(-1, 5), "first=-1"),
])
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message):
        call()
