import math
import statistics

import chex
import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxwm import dists, numerics
from jaxwm.types import Discrete, JaxwmError

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 3)), jnp.float32)
OTHER = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 3)), jnp.float32)
RAW = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2)), jnp.float32)
# The name of a distribution, the distribution, its batch and event shapes, and a sample dtype.
ALL = [
    ("one_hot", lambda: dists.OneHot(LOGITS, 0.01), (5,), (4, 3), "float32"),
    ("categorical", lambda: dists.Categorical(LOGITS), (5, 4), (), "int32"),
    ("multi", lambda: dists.Categorical(LOGITS, event_ndims=1), (5,), (4,), "int32"),
    ("two_hot", lambda: dists.TwoHot(LOGITS, numerics.symexp_bins(3)), (5, 4), (), "float32"),
    ("normal", lambda: dists.BoundedNormal(RAW, RAW), (5,), (2,), "float32"),
    ("plain_normal", lambda: dists.Normal(RAW, jnp.exp(RAW)), (5,), (2,), "float32"),
    ("unit_normal", lambda: dists.UnitNormal(LOGITS, 2), (5,), (4, 3), "float32"),
    ("tanh_normal", lambda: dists.TanhNormal.from_raw(RAW, RAW, 0.5), (5,), (2,), "float32"),
    ("truncated", lambda: dists.TruncatedNormal.from_raw(RAW, RAW), (5,), (2,), "float32"),
    ("one_hot_action", lambda: dists.OneHotAction(LOGITS, None, 1), (5,), (4, 3), "float32"),
    ("bernoulli", lambda: dists.SoftBernoulli(RAW), (5, 2), (), "bool"),
    ("symlog", lambda: dists.SymlogSquaredError(RAW), (5,), (2,), "float32"),
    ("image", lambda: dists.ImageSquaredError(LOGITS), (), (5, 4, 3), "uint8"),
]


@pytest.mark.parametrize(
    ("make", "batch", "event", "dtype"), [row[1:] for row in ALL], ids=[row[0] for row in ALL]
)
def test_every_distribution_keeps_the_contract_of_distrax(make, batch, event, dtype):
    dist = make()
    assert isinstance(dist, distrax.Distribution)
    assert (dist.batch_shape, dist.event_shape) == (batch, event)
    sample, log_prob = dist.sample_and_log_prob(seed=jax.random.key(0), sample_shape=(2, 6))
    assert sample.shape == (2, 6, *batch, *event) and sample.dtype == dtype
    assert log_prob.shape == (2, 6, *batch) and log_prob.dtype == jnp.float32
    assert np.all(np.isfinite(log_prob))
    np.testing.assert_allclose(dist.log_prob(sample[1, 2]), log_prob[1, 2], rtol=1e-6)
    assert dist.mode().shape == (*batch, *event)
    # A pytree: distributions may leave compiled functions.
    outside = jax.jit(make)()
    np.testing.assert_allclose(outside.log_prob(sample[1, 2]), log_prob[1, 2], rtol=1e-5)


def test_low_precision_inputs_are_computed_in_float32():
    low = LOGITS.astype(jnp.bfloat16)
    exact = dists.OneHot(low.astype(jnp.float32), 0.01)
    np.testing.assert_array_equal(dists.OneHot(low, 0.01).entropy(), exact.entropy())
    for dist in (
        dists.Categorical(low),
        dists.TwoHot(low, numerics.symexp_bins(3)),
        dists.BoundedNormal(low, low),
    ):
        assert dist.log_prob(dist.mode()).dtype == jnp.float32


def test_one_hot_worked_by_hand():
    # Probabilities 1/4 and 3/4; mixed half and half with 1/2: 3/8 and 5/8.
    logits = jnp.log(jnp.asarray([[1.0, 3.0]]))
    np.testing.assert_allclose(dists.OneHot(logits).probs, [[0.25, 0.75]], rtol=1e-6)
    mixed = dists.OneHot(logits, unimix=0.5)
    np.testing.assert_allclose(mixed.probs, [[0.375, 0.625]], rtol=1e-6)
    np.testing.assert_allclose(mixed.log_prob(jnp.asarray([[1, 0]])), np.log(0.375), rtol=1e-6)
    np.testing.assert_array_equal(mixed.mode(), [[0, 1]])


def test_one_hot_equals_distrax():
    ours, other = dists.OneHot(LOGITS), dists.OneHot(OTHER)
    theirs = distrax.Independent(distrax.OneHotCategorical(LOGITS, dtype=jnp.float32), 1)
    sample = ours.sample(seed=jax.random.key(0))
    np.testing.assert_allclose(ours.log_prob(sample), theirs.log_prob(sample), rtol=1e-5)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-5)
    kl = distrax.OneHotCategorical(LOGITS).kl_divergence(distrax.OneHotCategorical(OTHER)).sum(-1)
    np.testing.assert_allclose(ours.kl_divergence(other), kl, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.kl_divergence(ours), 0, atol=1e-6)


def test_one_hot_by_uniform_draws():
    # Shares 0.1, 0.6, 0.3 of [0, 1); with half of the uniform one mixed in 13/60, 28/60, 19/60.
    logits = jnp.log(jnp.asarray([[0.1, 0.6, 0.3]])) + 7
    for mix, edges in ((0.0, (0.1, 0.7)), (0.5, (13 / 60, 41 / 60))):
        for draw, index in (
            (0.0, 0),
            (edges[0] - 1e-4, 0),
            (edges[0] + 1e-4, 1),
            (edges[1] - 1e-4, 1),
            (edges[1] + 1e-4, 2),
            (1 - 2**-24, 2),
        ):
            sample = dists.OneHot(logits, mix).sample_uniform(jnp.asarray([draw]))
            np.testing.assert_array_equal(sample, np.eye(3)[[index]])
    # As often as the probabilities say, a class without any never.
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf, 2.0], [3.0, 0.0, 0.0, -200.0]])
    count = 20_000
    uniform = jax.random.uniform(jax.random.key(0), (count, 2))
    dist = dists.OneHot(jnp.broadcast_to(logits, (count, 2, 4)))
    drawn = dist.sample_uniform(uniform).mean(0)
    np.testing.assert_allclose(drawn, dist.probs[0], atol=5 * 0.5 / np.sqrt(count))
    assert drawn[0, 2] == 0


@pytest.mark.parametrize("method", ["sample_noise", "sample_uniform"])
def test_one_hot_samples_with_the_gradient_of_the_probabilities(method):
    draws = {
        "sample_noise": jax.random.gumbel(jax.random.key(0), LOGITS.shape),
        "sample_uniform": jax.random.uniform(jax.random.key(0), LOGITS.shape[:-1]),
    }[method]
    draw = lambda dist: getattr(dist, method)(draws)  # noqa: E731
    sample = draw(dists.OneHot(LOGITS, 0.01))
    assert set(np.unique(sample)) == {0.0, 1.0}
    np.testing.assert_array_equal(sample.sum(-1), 1)
    by_sample, by_probs = (
        jax.grad(lambda logits, f=f: jnp.sum(OTHER * f(dists.OneHot(logits, 0.01))))(LOGITS)
        for f in (draw, lambda d: d.probs)
    )
    np.testing.assert_allclose(by_sample, by_probs, rtol=1e-6, atol=1e-8)


def test_sample_frequencies_are_the_probabilities():
    mask = np.array([True, True, False])
    count = 20_000
    for dist, counts in (
        (dists.OneHot(LOGITS[:1], 0.1), lambda s: s.mean(0)),
        (dists.Categorical(LOGITS[:1], mask, 0.1), lambda s: jax.nn.one_hot(s, 3).mean(0)),
    ):
        frequency = counts(dist.sample(seed=jax.random.key(0), sample_shape=(count,)))
        # Five standard errors of a proportion of one half.
        np.testing.assert_allclose(frequency, dist.probs, atol=5 * 0.5 / np.sqrt(count))


@pytest.mark.parametrize("unimix", [0.0, 0.01])
@pytest.mark.parametrize("mask", [None, np.array([True, True, False])])
def test_a_swept_uniform_share_is_as_a_fixed_one(unimix, mask):
    """Classes of a probability that is no number of float32 too."""
    logits = jnp.array([0.0, -120.0, 3.0])

    def entropy(logits, unimix):
        return dists.Categorical(logits, mask, unimix).entropy()

    fixed = jax.value_and_grad(lambda x: entropy(x, unimix))(logits)
    swept = jax.jit(jax.value_and_grad(entropy))(logits, jnp.float32(unimix))
    chex.assert_trees_all_close(swept, fixed, atol=1e-6)


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_categorical_ignores_classes_that_do_not_exist(unimix):
    space = Discrete((3, 2), shape=(2,))
    logits = LOGITS[:, :2]
    dist = dists.Categorical(logits, space.mask(), unimix, event_ndims=1)
    first = dists.Categorical(logits[:, 0], None, unimix)
    second = dists.Categorical(logits[:, 1, :2], None, unimix)
    np.testing.assert_allclose(dist.entropy(), first.entropy() + second.entropy(), rtol=1e-6)
    value = jnp.asarray([[0, 0], [1, 1], [2, 0], [2, 1], [0, 1]], jnp.int32)
    expected = first.log_prob(value[:, 0]) + second.log_prob(value[:, 1])
    np.testing.assert_allclose(dist.log_prob(value), expected, rtol=1e-6)
    np.testing.assert_array_equal(dist.probs[:, 1, 2], 0.0)
    noise = jnp.zeros((5, 2, 3)).at[..., 2].set(50.0)  # as lucky as class 2 can be
    np.testing.assert_array_equal(dist.sample_noise(noise), [[2, i] for i in second.mode()])
    for function in (lambda d: d.entropy(), lambda d: d.log_prob(value)):
        gradient = jax.grad(
            lambda x, f=function: f(dists.Categorical(x, space.mask(), unimix, 1)).sum()
        )(logits)
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[:, 1, 2], 0.0)


def test_categorical_equals_distrax():
    ours, theirs = dists.Categorical(LOGITS), distrax.Categorical(LOGITS)
    value = jnp.asarray(np.random.default_rng(3).integers(0, 3, (5, 4)), jnp.int32)
    np.testing.assert_allclose(ours.log_prob(value), theirs.log_prob(value), rtol=1e-5)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-5)
    np.testing.assert_array_equal(ours.mode(), theirs.mode())
    gumbel = jax.random.gumbel(jax.random.key(0), LOGITS.shape)
    np.testing.assert_array_equal(
        ours.sample_noise(gumbel), jnp.argmax(LOGITS + gumbel, -1).astype(jnp.int32)
    )


def test_categorical_refuses_a_mask_of_another_space():
    with pytest.raises(JaxwmError, match=r"mask of shape \(2,\) for logits of shape \(5, 4, 3\)"):
        dists.Categorical(LOGITS, np.ones(2, bool))


def test_two_hot_worked_by_hand():
    bins = jnp.asarray([-4.0, 0.0, 4.0])
    dist = dists.TwoHot(jnp.log(jnp.asarray([0.5, 0.25, 0.25])), bins)
    # Mean: -2 + 0 + 1. The value 3 is a quarter 0 and three quarters 4, both of probability 1/4.
    np.testing.assert_allclose(dist.mean(), -1, rtol=1e-6)
    np.testing.assert_allclose(dist.log_prob(jnp.asarray(3.0)), np.log(0.25), rtol=1e-6)
    np.testing.assert_allclose(
        dist.log_prob(jnp.asarray(-2.0)), 0.5 * np.log(0.5) + 0.5 * np.log(0.25), rtol=1e-6
    )


def test_two_hot_is_learned_by_its_log_prob():
    # The cross-entropy is stationary where the probabilities are the weights of the target.
    bins, value = numerics.symexp_bins(41), jnp.asarray([3.0, -700.0])
    logits = jnp.log(numerics.twohot(value, bins) + 1e-12)
    slope = jax.grad(lambda x: dists.TwoHot(x, bins).log_prob(value).sum())(logits)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    np.testing.assert_array_equal(
        jax.grad(lambda v: dists.TwoHot(logits, bins).log_prob(v).sum())(value), 0.0
    )


def test_two_hot_with_uniform_logits_predicts_exactly_zero():
    for n in (255, 64):
        dist = dists.TwoHot(jnp.zeros((2, n)), numerics.symexp_bins(n))
        np.testing.assert_array_equal(dist.mean(), 0.0)
        np.testing.assert_array_equal(dist.mode(), 0.0)


def test_bounded_normal_equals_distrax():
    dist = dists.BoundedNormal(RAW, -RAW)
    std = 0.9 / (1 + np.exp(np.asarray(RAW) - 2)) + 0.1
    theirs = distrax.MultivariateNormalDiag(jnp.tanh(RAW), jnp.asarray(std))
    value = jnp.asarray([[0.3, -1.2]] * 5)
    np.testing.assert_allclose(dist.log_prob(value), theirs.log_prob(value), rtol=1e-5)
    np.testing.assert_allclose(dist.entropy(), theirs.entropy(), rtol=1e-5)
    np.testing.assert_allclose(dist.stddev(), std, rtol=1e-6)
    noise = jnp.ones((5, 2))
    np.testing.assert_allclose(dist.sample_noise(noise), np.tanh(RAW) + std, atol=1e-6)
    scalar = dists.BoundedNormal(RAW, -RAW, event_ndims=0)
    np.testing.assert_allclose(scalar.entropy().sum(-1), dist.entropy(), rtol=1e-6)
    np.testing.assert_array_equal(dist.mode(), dist.mean())


def test_bounded_normal_stays_within_its_bounds():
    raw = jnp.asarray([-1e4, 1e4])
    dist = dists.BoundedNormal(raw, raw, min_std=0.2, max_std=3.0)
    np.testing.assert_allclose(dist.mean(), [-1, 1])
    np.testing.assert_allclose(dist.stddev(), [0.2, 3.0], rtol=1e-6)


def test_the_kl_of_normals_equals_distrax():
    pair = [dists.Normal(RAW, jnp.exp(OTHER[:, 0, :2])), dists.Normal(OTHER[:, 1, :2], 1 + RAW**2)]
    theirs = [distrax.MultivariateNormalDiag(x.loc, x.scale) for x in pair]
    kl = theirs[0].kl_divergence(theirs[1])
    np.testing.assert_allclose(pair[0].kl_divergence(pair[1]), kl, rtol=1e-5)
    np.testing.assert_allclose(pair[0].kl_divergence(pair[0]), 0, atol=1e-6)


def test_unit_normal_is_a_normal_with_all_constants():
    ours = dists.UnitNormal(LOGITS, 2)
    theirs = distrax.MultivariateNormalDiag(LOGITS.reshape(5, -1), jnp.ones((5, 12)))
    np.testing.assert_allclose(ours.log_prob(OTHER), theirs.log_prob(OTHER.reshape(5, -1)), 1e-5)
    # -log(2 pi) / 2 at the mean, and half of 3^2 less at a distance of 3.
    single = dists.UnitNormal(jnp.zeros(2), 0)
    expected = [-0.9189385, -5.4189385]
    np.testing.assert_allclose(single.log_prob(jnp.asarray([0.0, 3.0])), expected, rtol=1e-6)
    np.testing.assert_array_equal(single.sample(seed=jax.random.key(0)), 0)


def test_tanh_normal_worked_by_hand():
    # softplus(log(e^5 - 1)) = 5, and 5 tanh(0) = 0.
    dist = dists.TanhNormal.from_raw(jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_allclose(dist.normal.scale, [5.0001], rtol=1e-6)
    np.testing.assert_array_equal(dist.normal.loc, [0.0])
    np.testing.assert_allclose(dist.sample_noise(jnp.asarray([0.1])), [np.tanh(0.50001)], rtol=1e-6)
    # Where the tanh has the slope 1 the density is that of the normal.
    normal = -np.log(5.0001) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(dist.log_prob(jnp.zeros(1)), normal, rtol=1e-6)
    wide = dists.TanhNormal.from_raw(jnp.asarray([1e3]), jnp.zeros(1), init_std=1.0)
    np.testing.assert_allclose(wide.normal.loc, [5.0])
    np.testing.assert_allclose(wide.normal.scale, [1.0001], rtol=1e-6)


def test_tanh_normal_equals_distrax():
    ours = dists.TanhNormal(RAW, jnp.exp(RAW))
    normal = distrax.MultivariateNormalDiag(RAW, jnp.exp(RAW))
    theirs = distrax.Transformed(normal, distrax.Block(distrax.Tanh(), 1))
    noise = jax.random.normal(jax.random.key(0), (9, 5, 2)) / 2
    action = ours.sample_noise(noise)
    log_prob = jax.vmap(theirs.log_prob)(action)
    np.testing.assert_allclose(ours.log_prob(action), log_prob, rtol=1e-3)
    np.testing.assert_allclose(ours.entropy_noise(noise), -log_prob.mean(0), rtol=1e-3)


def test_tanh_normal_is_finite_where_the_tanh_saturates():
    dist = dists.TanhNormal(jnp.asarray([5.0, -5.0]), jnp.full(2, 5.0), event_ndims=0)
    ends = jnp.asarray([1.0, -1.0])
    assert np.all(np.isfinite(dist.log_prob(ends)))
    noise = jnp.asarray([[3.0, -3.0]])

    def entropy(loc):
        return dists.TanhNormal(loc, dist.normal.scale, 0).entropy_noise(noise).sum()

    value, slope = jax.value_and_grad(entropy)(dist.normal.loc)
    # x = 20: -log Normal + 2 (log 2 - 20 - softplus(-40)), known to the last digit.
    expected = 2 * (0.5 * 9 + np.log(5) + 0.5 * np.log(2 * np.pi) + 2 * (np.log(2) - 20))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, [-2, 2], rtol=1e-5)


def test_the_mode_of_a_tanh_normal_is_the_most_likely_draw_of_every_row():
    dist = dists.TanhNormal(jnp.asarray([[0.0], [2.0]]), jnp.full((2, 1), 0.2))
    # Actions 0.5 before the tanh are unlikely in the first row; far up, where the tanh squeezes,
    # draws above the mean are the likelier ones.
    noise = jnp.asarray([[[2.5], [-1.0]], [[0.1], [0.3]], [[-2.0], [0.0]]])
    np.testing.assert_array_equal(dist.most_likely(noise), [1, 1])
    expected = [[np.tanh(0.02)], [np.tanh(2.06)]]
    np.testing.assert_allclose(dist.mode_noise(noise), expected, rtol=1e-6)
    np.testing.assert_allclose(dist.mode(), [[0.0], [np.tanh(2.0)]], rtol=1e-6)


LOC, SCALE = jnp.asarray([[-0.9, 0.0, 0.5]]), jnp.asarray([[0.3, 2.1, 0.1]])


def _density(action, loc, scale):
    """Of a truncated normal, normalised by the trapezoidal rule in float64."""
    grid = np.linspace(-1, 1, 200_001)
    weight = lambda x: np.exp(-0.5 * ((x - loc) / scale) ** 2)  # noqa: E731
    return weight(action) / np.trapezoid(weight(grid), grid)


def test_truncated_normal_equals_a_numerical_integral():
    dist = dists.TruncatedNormal(LOC, SCALE)
    action = np.asarray([[-0.8, 0.3, 0.45]])
    loc, scale = (np.asarray(x, np.float64) for x in (LOC, SCALE))
    pairs = list(zip(action[0], loc[0], scale[0], strict=True))
    log_prob = sum(np.log(_density(*pair)) for pair in pairs)
    np.testing.assert_allclose(dist.log_prob(jnp.asarray(action)), [log_prob], rtol=1e-5)
    grid = np.linspace(-1, 1, 200_001)
    rows = [_density(grid, loc, scale) for _, loc, scale in pairs]
    entropy = sum(-np.trapezoid(p * np.log(np.maximum(p, 1e-300)), grid) for p in rows)
    np.testing.assert_allclose(dist.entropy(), [entropy], rtol=1e-5)
    # The draw u lies at the action below which the share u of the density is.
    uniform = jnp.asarray([[0.25, 0.6, 0.9]])
    for p, u, a in zip(rows, uniform[0], dist.sample_noise(uniform)[0], strict=True):
        below = np.trapezoid(np.where(grid <= float(a), p, 0), grid)
        np.testing.assert_allclose(below, u, atol=1e-4)
    np.testing.assert_array_equal(dist.mode(), LOC)


def test_truncated_normal_from_a_networks_output():
    # 2 sigmoid(0) + 0.1, and 2 sigmoid(log(3)) + 0.2 = 1.5 + 0.2.
    dist = dists.TruncatedNormal.from_raw(jnp.asarray([0.5]), jnp.zeros(1))
    np.testing.assert_allclose(dist.scale, [1.1], rtol=1e-6)
    np.testing.assert_allclose(dist.loc, [np.tanh(0.5)], rtol=1e-6)
    other = dists.TruncatedNormal.from_raw(jnp.zeros(1), jnp.ones(1), 0.2, 2 * np.log(3) - 1)
    np.testing.assert_allclose(other.scale, [1.7], rtol=1e-6)


UNIFORM = jnp.asarray([[0.02, 0.5, 0.97]])


def test_truncated_normal_samples_with_the_gradient_of_a_normal():
    def sample(loc, scale, **options):
        return dists.TruncatedNormal(loc, scale, **options).sample_noise(UNIFORM)

    action = sample(LOC, SCALE)
    loc, scale = jax.grad(lambda *x: sample(*x).sum(), (0, 1))(LOC, SCALE)
    np.testing.assert_array_equal(loc, jnp.ones((1, 3)))
    np.testing.assert_allclose(scale, (action - LOC) / SCALE, rtol=1e-5, atol=1e-6)
    # The exact gradient is that of the same sample, by differences in float64.
    np.testing.assert_array_equal(sample(LOC, SCALE, implicit=True), action)
    exact = jax.grad(lambda *x: sample(*x, implicit=True).sum(), (0, 1))(LOC, SCALE)

    def inverse(u, loc, scale):
        phi = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))  # noqa: E731
        lo, hi = phi((-1 - loc) / scale), phi((1 - loc) / scale)
        z = statistics.NormalDist().inv_cdf(lo + u * (hi - lo))
        return loc + scale * z

    for i in range(3):
        u, loc, scale = (float(x[0, i]) for x in (UNIFORM, LOC, SCALE))
        slopes = (
            (inverse(u, loc + 1e-5, scale) - inverse(u, loc - 1e-5, scale)) / 2e-5,
            (inverse(u, loc, scale + 1e-5) - inverse(u, loc, scale - 1e-5)) / 2e-5,
        )
        np.testing.assert_allclose([x[0, i] for x in exact], slopes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implicit", [False, True])
def test_truncated_normal_is_finite_at_every_draw(implicit):
    raw = jnp.asarray([-20.0, -20.0, 0.0, 20.0, 20.0])
    draws = jnp.asarray([0.0, 1e-7, 0.5, 1 - 2**-24, 1 - 2**-24])
    for std in (-20.0, 20.0):

        def sample(mean, std):
            dist = dists.TruncatedNormal.from_raw(mean, std, event_ndims=0, implicit=implicit)
            return dist.sample_noise(draws)

        stds = jnp.full(5, std)
        action = sample(raw, stds)
        assert np.all(np.abs(action) <= 1 - 0.9e-6)
        for slope in jax.grad(lambda *x, f=sample: f(*x).sum(), (0, 1))(raw, stds):
            assert np.all(np.isfinite(slope))
        dist = dists.TruncatedNormal.from_raw(raw, stds, event_ndims=0)
        for value in (dist.log_prob(action), dist.entropy()):
            assert np.all(np.isfinite(value))


def test_one_hot_actions_worked_by_hand():
    dist = dists.OneHotAction(jnp.log(jnp.asarray([0.25, 0.75])))
    np.testing.assert_array_equal(dist.sample_noise(jnp.asarray([2.0, 0.0])), [1, 0])
    np.testing.assert_array_equal(dist.sample_noise(jnp.asarray([1.0, 0.0])), [0, 1])
    np.testing.assert_allclose(dist.log_prob(jnp.asarray([1.0, 0.0])), np.log(0.25), rtol=1e-6)
    entropy = -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    np.testing.assert_allclose(dist.entropy(), entropy, rtol=1e-6)
    np.testing.assert_array_equal(dist.mode(), [0, 1])


def test_one_hot_actions_pass_gradients_on_like_their_probabilities():
    gumbel = jax.random.gumbel(jax.random.key(0), LOGITS.shape)
    by_sample, by_probs = (
        jax.grad(lambda x, f=f: jnp.sum(OTHER * f(dists.OneHotAction(x, None, 1))))(LOGITS)
        for f in (lambda d: d.sample_noise(gumbel), lambda d: d.probs)
    )
    np.testing.assert_allclose(by_sample, by_probs, rtol=1e-6, atol=1e-8)
    slope = jax.grad(lambda x: dists.OneHotAction(LOGITS).log_prob(x).sum())(OTHER)
    np.testing.assert_array_equal(slope, 0.0)


def test_one_hot_actions_are_those_of_the_categorical_with_missing_classes_too():
    space = Discrete((3, 2), shape=(2,))
    logits = LOGITS[:, :2]
    ours = dists.OneHotAction(logits, space.mask(), event_ndims=1)
    theirs = dists.Categorical(logits, space.mask(), event_ndims=1)
    gumbel = jax.random.gumbel(jax.random.key(0), logits.shape)
    np.testing.assert_array_equal(ours.sample_noise(gumbel).argmax(-1), theirs.sample_noise(gumbel))
    np.testing.assert_allclose(
        ours.log_prob(ours.mode()), theirs.log_prob(theirs.mode()), rtol=1e-6
    )
    np.testing.assert_array_equal(ours.entropy(), theirs.entropy())


def test_soft_bernoulli_worked_by_hand():
    # log-odds log(3): yes with probability 3/4.
    dist = dists.SoftBernoulli(jnp.log(jnp.asarray([3.0])))
    np.testing.assert_allclose(dist.probs, [0.75], rtol=1e-6)
    for target, expected in (
        (True, np.log(0.75)),
        (0.0, np.log(0.25)),
        (0.5, 0.5 * np.log(0.75) + 0.5 * np.log(0.25)),
    ):
        np.testing.assert_allclose(dist.log_prob(jnp.asarray([target])), expected, rtol=1e-6)
    np.testing.assert_allclose(
        dist.entropy(), -0.75 * np.log(0.75) - 0.25 * np.log(0.25), rtol=1e-6
    )
    assert dist.mode().tolist() == [True]


def test_soft_bernoulli_is_finite_for_certain_logits():
    logit, target = jnp.asarray([-200.0, 200.0]), jnp.asarray([1.0, 0.0])
    value, slope = jax.value_and_grad(lambda x: dists.SoftBernoulli(x).log_prob(target).sum())(
        logit
    )
    assert value == -400
    np.testing.assert_array_equal(slope, [1, -1])


def test_squared_errors_worked_by_hand():
    pred = jnp.asarray([[0.0, 2.0]])
    dist = dists.SymlogSquaredError(pred)
    # symlog(e - 1) = 1 and symlog(0) = 0: -(1 + 4).
    np.testing.assert_allclose(dist.log_prob(jnp.asarray([[np.e - 1, 0.0]])), [-5], rtol=1e-6)
    np.testing.assert_allclose(dist.mode(), [[0, np.e**2 - 1]], rtol=1e-6)
    flat = dists.SymlogSquaredError(pred, event_ndims=0)
    np.testing.assert_allclose(flat.log_prob(jnp.asarray([[np.e - 1, 0.0]])), [[-1, -4]], rtol=1e-6)

    image = dists.ImageSquaredError(jnp.asarray([0.0, 1.0, 0.5, 1.7]).reshape(1, 2, 2, 1))
    target = jnp.asarray([255, 255, 51, 255], jnp.uint8).reshape(1, 2, 2, 1)
    # 1 + 0 + (0.5 - 0.2)^2 + 0.7^2 = 1.58
    np.testing.assert_allclose(image.log_prob(target), [-1.58], rtol=1e-6)
    np.testing.assert_allclose(image.log_prob(target.astype(jnp.float32)), [-1.58], rtol=1e-6)
    assert image.mean().reshape(-1).tolist() == [0, 255, 128, 255]


def test_squared_error_is_a_normal_up_to_a_constant():
    dist = dists.SymlogSquaredError(RAW)
    normal = distrax.MultivariateNormalDiag(RAW, jnp.full(RAW.shape, np.sqrt(0.5)))
    a, b = RAW + 1.0, 3.0 * RAW
    np.testing.assert_allclose(
        dist.log_prob(a) - dist.log_prob(b),
        normal.log_prob(numerics.symlog(a)) - normal.log_prob(numerics.symlog(b)),
        rtol=1e-4,
    )


def test_vmap_equals_the_batch():
    batched = dists.OneHot(LOGITS, 0.01).kl_divergence(dists.OneHot(OTHER, 0.01))
    mapped = jax.vmap(lambda p, q: dists.OneHot(p, 0.01).kl_divergence(dists.OneHot(q, 0.01)))
    np.testing.assert_allclose(mapped(LOGITS, OTHER), batched, rtol=1e-6)
    # A distribution may itself be mapped over.
    entropies = jax.vmap(lambda d: d.entropy())(dists.OneHot(LOGITS, 0.01))
    np.testing.assert_allclose(entropies, dists.OneHot(LOGITS, 0.01).entropy(), rtol=1e-6)


def test_normal_worked_by_hand():
    dist = dists.Normal(jnp.asarray([[1.0, -1.0]]), jnp.asarray([[2.0, 0.5]]))
    # Deviations of 1 and of 2: -(1 + 4) / 2 - log(2 * 0.5) - log(2 pi).
    got = dist.log_prob(jnp.asarray([[3.0, 0.0]]))
    np.testing.assert_allclose(got, -2.5 - np.log(2 * np.pi), rtol=1e-6)
    np.testing.assert_allclose(dist.entropy(), np.log(2 * np.pi) + 1, rtol=1e-6)
    np.testing.assert_allclose(dist.sample_noise(jnp.asarray([[1.0, -2.0]])), [[3, -2]], rtol=1e-6)
    np.testing.assert_array_equal(dist.mode(), [[1, -1]])


def test_normal_equals_distrax():
    theirs = distrax.MultivariateNormalDiag(RAW, jnp.exp(RAW))
    ours = dists.Normal(RAW, jnp.exp(RAW))
    value = jnp.asarray([[0.3, -1.2]] * 5)
    np.testing.assert_allclose(ours.log_prob(value), theirs.log_prob(value), rtol=1e-5)
    np.testing.assert_allclose(ours.entropy(), theirs.entropy(), rtol=1e-5)
