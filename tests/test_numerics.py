import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxwm import backend, numerics
from jaxwm.types import ALONE, JaxwmError, Shards

FLOATS = st.floats(-1e9, 1e9, width=32)


def test_symlog_worked_by_hand():
    # log(1 + (e - 1)) = 1 and log(1 + (e^2 - 1)) = 2, with the sign of the input.
    x = jnp.asarray([0.0, np.e - 1, 1 - np.e**2])
    np.testing.assert_allclose(numerics.symlog(x), [0, 1, -2], rtol=1e-6)


def test_symexp_undoes_symlog():
    x = jnp.asarray([-1e6, -3.0, -1e-8, 0.0, 1e-8, 0.5, 1e9])
    np.testing.assert_allclose(numerics.symexp(numerics.symlog(x)), x, rtol=5e-6)


def test_symlog_is_the_identity_near_zero_for_gradients_too():
    slopes = [
        jax.grad(f)(0.0)
        for f in (
            lambda x: numerics.symlog(jnp.asarray(x)),
            lambda x: numerics.symexp(jnp.asarray(x)),
        )
    ]
    assert slopes == [1.0, 1.0]


def test_symlog_computes_in_float32():
    x = jnp.asarray([3, -4], jnp.bfloat16)
    assert numerics.symlog(x).dtype == jnp.float32
    np.testing.assert_allclose(numerics.symlog(x), [np.log(4), -np.log(5)], rtol=1e-6)
    assert numerics.symlog(jnp.asarray([7], jnp.int32)).dtype == jnp.float32


@pytest.mark.parametrize("n", [3, 4, 41, 255])
def test_bins_mirror_exactly(n):
    bins = np.asarray(numerics.symexp_bins(n))
    assert bins.shape == (n,) and bins.dtype == np.float32
    np.testing.assert_array_equal(bins, -bins[::-1])
    assert np.sum(bins == 0) == 2 - n % 2
    assert np.all(np.diff(bins)[np.arange(n - 1) != (n / 2 - 1)] > 0)
    # The half is evenly spaced in symlog space, from -20 to 0.
    half = -np.expm1(np.linspace(20, 0, (n + 1) // 2))
    np.testing.assert_allclose(bins[: len(half)], half, rtol=3e-6)


def test_too_few_bins_are_refused():
    with pytest.raises(JaxwmError, match=r"n=2.*at least 3"):
        numerics.symexp_bins(2)


def test_twohot_worked_by_hand():
    bins = jnp.asarray([-4.0, -1.0, 0.0, 1.0, 4.0])
    # 2 lies a third of the way from 1 to 4; -4.5, 9 and the infinities are beyond the ends.
    values = jnp.asarray([2.0, -0.25, 1.0, -4.5, 9.0, np.inf, -np.inf])
    expected = [
        [0, 0, 0, 2 / 3, 1 / 3],
        [0, 0.25, 0.75, 0, 0],
        [0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(numerics.twohot(values, bins), expected, atol=1e-7)


def test_twohot_where_two_bins_coincide():
    bins = jnp.asarray([-2.0, 0.0, 0.0, 2.0])
    weights = numerics.twohot(jnp.asarray([0.0, -0.0, 0.5, -0.5]), bins)
    expected = [[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0.75, 0.25], [0.25, 0.75, 0, 0]]
    np.testing.assert_array_equal(weights, expected)


def _search(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Two-hot weights in float64 by binary search: another algorithm, without ramps."""
    inside = np.clip(values.astype(np.float64), bins[0], bins[-1])
    lower = np.clip(np.searchsorted(bins, inside, side="right") - 1, 0, len(bins) - 2)
    share = (inside - bins[lower]) / (bins[lower + 1] - bins[lower])
    weights = np.zeros((len(values), len(bins)))
    rows = np.arange(len(values))
    weights[rows, lower], weights[rows, lower + 1] = 1 - share, share
    return weights


@pytest.mark.parametrize("n", [255, 64])
def test_twohot_equals_binary_search_on_and_beside_every_bin(n):
    bins = np.asarray(numerics.symexp_bins(n))
    up, down = np.nextafter(bins, np.float32(np.inf)), np.nextafter(bins, np.float32(-np.inf))
    beside = [edge[np.abs(edge) > 1e-37] for edge in (up, down)]  # subnormals flush to zero
    middle = (bins[1:] + bins[:-1]) / 2
    values = np.concatenate([bins, *beside, middle])
    weights = np.asarray(jax.jit(numerics.twohot)(jnp.asarray(values), jnp.asarray(bins)))
    np.testing.assert_allclose(weights, _search(values, bins.astype(np.float64)), atol=3e-7)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@hypothesis.given(st.lists(FLOATS, min_size=8, max_size=8))
@hypothesis.settings(max_examples=25, deadline=None)
def test_twohot_mean_undoes_twohot(values):
    bins, values = numerics.symexp_bins(255), np.clip(np.float32(values), -4.8e8, 4.8e8)
    logits = jnp.log(numerics.twohot(jnp.asarray(values), bins) + 1e-30)
    mean = numerics.twohot_mean(logits, bins)
    # Weights of both neighbours are rounded at 1, the neighbours are within 17 %.
    np.testing.assert_allclose(mean, values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [255, 64, 3])
def test_uniform_probabilities_have_mean_exactly_zero(n):
    bins = numerics.symexp_bins(n)
    for decode in (numerics.twohot_mean, jax.jit(numerics.twohot_mean)):
        np.testing.assert_array_equal(decode(jnp.full((2, 3, n), 0.7), bins), np.zeros((2, 3)))


def test_twohot_mean_feels_the_last_bit_of_the_logits():
    # The first steps of training leave the far bins' logits equal but for rounding; their
    # probabilities, rounded in turn, would differ by 1e-10 and the mean by 0.05.
    bins = numerics.symexp_bins(255)
    logits = 1e-5 * np.random.default_rng(0).normal(size=(16, 255)).astype(np.float32)
    exact = np.exp(logits.astype(np.float64))
    exact = (exact / exact.sum(-1, keepdims=True)) @ np.asarray(bins, np.float64)
    mean = numerics.twohot_mean(jnp.asarray(logits), bins)
    np.testing.assert_allclose(mean, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("n", [1, 2, 33, 64, 65, 255])
def test_softmax_and_logsumexp_equal_those_of_jax(n):
    logits = 30 * jax.random.normal(jax.random.key(n), (4, 3, n)) + 200  # exp of it overflows
    for ours, theirs in (
        (numerics.softmax, jax.nn.softmax),
        (numerics.logsumexp, functools.partial(jax.nn.logsumexp, axis=-1)),
    ):
        have, want = (
            jax.value_and_grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(logits)
            for f in (ours, theirs)
        )
        np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(have[0], want[0], rtol=1e-5)
        np.testing.assert_allclose(have[1], want[1], rtol=1e-4, atol=1e-5)


def test_twohot_dot_is_the_sum_and_has_its_gradient():
    rng = np.random.default_rng(0)
    bins = numerics.symexp_bins(9)
    values = jnp.asarray([0.0, 0.7, -3e4, 1e12, -np.inf, *np.asarray(bins)])
    logits = jnp.asarray(rng.standard_normal((len(values), 9)), jnp.float32)

    def ours(logits):
        return jnp.sum(jnp.sin(numerics.twohot_dot(logits, values, bins)))

    def plain(logits):
        return jnp.sum(jnp.sin(jnp.sum(numerics.twohot(values, bins) * logits, -1)))

    have, want = (jax.value_and_grad(f)(logits) for f in (ours, plain))
    np.testing.assert_allclose(have[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(have[1], want[1], atol=1e-6)
    assert np.isnan(numerics.twohot_dot(logits[0], jnp.asarray(np.nan), bins))


def test_twohot_passes_no_gradient_and_no_nan():
    bins = numerics.symexp_bins(64)
    slope = jax.grad(lambda x: jnp.sum(numerics.twohot(x, bins)[..., 40]))
    np.testing.assert_array_equal(slope(jnp.asarray([0.0, 3.0, 1e12])), 0.0)
    assert np.all(np.isnan(numerics.twohot(jnp.asarray(np.nan), bins)))


def test_percentiles_worked_by_hand():
    # 0..100 has its 5th percentile at 5 and its 95th at 95; a hundredth of that is mixed in.
    state = numerics.percentiles_init()
    state = numerics.percentiles_update(state, jnp.arange(101.0))
    np.testing.assert_allclose(state, (0.05, 0.95), rtol=1e-6)
    assert numerics.percentiles_scale(state) == 1.0
    np.testing.assert_allclose(numerics.percentiles_scale(state, limit=0.1), 0.9, rtol=1e-6)
    # Once more: 0.99 * 0.05 + 0.01 * 5 = 0.0995.
    state = numerics.percentiles_update(state, jnp.arange(101.0))
    np.testing.assert_allclose(state, (0.0995, 1.8905), rtol=1e-6)


def test_percentiles_interpolate_over_all_entries():
    x = np.random.default_rng(0).normal(size=(7, 5, 2)).astype("f4")
    state = numerics.percentiles_update(
        numerics.percentiles_init(), jnp.asarray(x), rate=1.0, low=20.0, high=70.0
    )
    np.testing.assert_allclose(state, np.percentile(x, [20, 70]), rtol=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).normal(size=(15, 64)),
        np.random.default_rng(1).normal(size=999) * 10.0 ** np.linspace(-30, 30, 999),
        np.random.default_rng(2).integers(-3, 3, 50),
        [-3e38, -2.0, -0.0, 0.0, 1e-38, 3.0, 3e38],
        [5.0],
    ],
    ids=["normal", "any size", "equal ones", "extremes", "one"],
)
def test_percentiles_are_those_of_numpy(x):
    x = np.asarray(x, np.float32)
    wanted = (0.0, 5.0, 20.0, 50.0, 95.0, 100.0)
    got = backend.percentile(jnp.asarray(x), *wanted)
    want = np.percentile(x.astype(float), wanted)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-38)
    np.testing.assert_array_equal(jax.vmap(lambda y: backend.percentile(y, 50))(x[None])[0], got[3])


def test_percentiles_of_what_is_no_number_are_none():
    assert np.isnan(backend.percentile(jnp.array([1.0, np.nan, 2.0]), 5, 95)).all()


def test_debiased_statistics_of_the_same_batch_are_those_of_the_batch():
    x = jnp.asarray([1.0, 2.0, 6.0])
    state, weight = numerics.moments_init(), jnp.zeros(())
    assert numerics.debias(state, weight) == (0.0, 0.0)
    for _ in range(3):
        state = numerics.moments_update(state, x, rate=0.1)
        weight = numerics.moving_average(weight, 1.0, 0.1)
    # Mean 3, mean square 41/3, hence a variance of 14/3; 1 - 0.9^3 = 0.271.
    np.testing.assert_allclose(weight, 0.271, rtol=1e-6)
    exact = numerics.debias(state, weight)
    np.testing.assert_allclose(exact, (3, 41 / 3), rtol=1e-6)
    np.testing.assert_allclose(numerics.moments_scale(exact), np.sqrt(14 / 3), rtol=1e-6)


def test_moments_of_a_constant_have_the_smallest_scale():
    state = numerics.moments_update(numerics.moments_init(), jnp.full((4,), 0.3), rate=1.0)
    assert numerics.moments_scale(state, limit=1e-2) == np.float32(1e-2)


@pytest.mark.parametrize(
    ("init", "update", "scale"),
    [
        (numerics.percentiles_init, numerics.percentiles_update, numerics.percentiles_scale),
        (numerics.moments_init, numerics.moments_update, numerics.moments_scale),
    ],
)
def test_statistics_pass_no_gradient(init, update, scale):
    x = jnp.arange(20.0)
    np.testing.assert_array_equal(jax.grad(lambda x: scale(update(init(), 9 * x)))(x), 0.0)


@pytest.mark.parametrize("n", [4, 5])
def test_mirrored_entries_stay_equal_in_any_order(n):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(7, n // 2)).astype(np.float32)
    middle = rng.normal(size=(7, n % 2)).astype(np.float32)
    x = jnp.asarray(np.concatenate([half, middle, half[:, ::-1]], 1))
    folded = numerics.fold_mirrored(x)
    assert not folded[:, -(n // 2) :].any()
    # Every column is added up in an order of its own.
    orders = [rng.permutation(7) for _ in range(n)]
    total = jnp.stack([functools.reduce(jnp.add, folded[o, i]) for i, o in enumerate(orders)])
    mean = numerics.unfold_mirrored(total)
    np.testing.assert_array_equal(mean, mean[::-1])
    np.testing.assert_allclose(mean, x.sum(0), rtol=1e-5)
    np.testing.assert_allclose(numerics.unfold_mirrored(numerics.fold_mirrored(x)), x, rtol=1e-6)


def test_means_over_shards_keep_the_mirrored_bins_of_heads_equal():
    rng = np.random.default_rng(0)
    half = rng.normal(size=(7, 3, 5)).astype(np.float32)
    x = jnp.concatenate([half, half[..., ::-1]], -1)
    orders = [rng.permutation(7) for _ in range(10)]

    def in_a_ring(x):  # every column is added up in an order of its own
        columns = [functools.reduce(jnp.add, x[o, :, i]) for i, o in enumerate(orders)]
        return jnp.stack(columns, -1)

    shards = Shards(mean=lambda tree: jax.tree.map(in_a_ring, tree))
    tree = {"reward": {"out": {"kernel": x}, "inner": x}, "policy": {"out": {"kernel": x}}}
    plain = shards.mean(tree)
    mean = numerics.keep_mirrored(shards, "reward/out").mean(tree)
    head = mean["reward"]["out"]["kernel"]
    np.testing.assert_array_equal(head, head[..., ::-1])
    np.testing.assert_allclose(head, x.sum(0), rtol=1e-5)
    assert (plain["reward"]["out"]["kernel"] != plain["reward"]["out"]["kernel"][..., ::-1]).any()
    np.testing.assert_array_equal(mean["policy"]["out"]["kernel"], plain["policy"]["out"]["kernel"])
    np.testing.assert_array_equal(mean["reward"]["inner"], plain["reward"]["inner"])
    # There is nothing to keep where there is one shard, or where devices hold parts.
    for other in (ALONE, shards._replace(whole=False)):
        assert numerics.keep_mirrored(other, "reward/out") is other


def test_running_statistics_are_those_of_everything_seen():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, size=(n, 2)).astype(np.float32) for n in (4, 1, 7)]
    state = numerics.running_init((2,))
    for part in parts:
        state = numerics.running_update(state, jnp.asarray(part), jnp.ones(len(part)))
    seen = np.concatenate(parts)
    assert state.count == 12
    np.testing.assert_allclose(state.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.variance, seen.var(0), rtol=1e-5)


def test_running_statistics_worked_by_hand():
    # 1 and 5 have the mean 3 and the variance 4; with 9 they have 5 and 32 / 3.
    weight = jnp.asarray([1.0, 0.0, 1.0])
    state = numerics.running_update(numerics.running_init(), jnp.asarray([1.0, 100.0, 5.0]), weight)
    np.testing.assert_allclose(state, (2, 3, 4), rtol=1e-6)
    state = numerics.running_update(state, jnp.asarray([9.0]), jnp.ones(1))
    np.testing.assert_allclose(state, (3, 5, 32 / 3), rtol=1e-6)
    same = numerics.running_update(state, jnp.asarray([7.0]), jnp.zeros(1))
    np.testing.assert_allclose(same, state, rtol=1e-6)
    got = numerics.running_normalize(state, jnp.asarray([5.0, 5 + 32**0.5, 1e9]))
    np.testing.assert_allclose(got, [0, 3**0.5, 10], rtol=1e-6)


def test_nothing_seen_changes_nothing():
    state = numerics.running_update(numerics.running_init((2,)), jnp.ones((3, 2)), jnp.zeros(3))
    x = jnp.asarray([[-3.0, 4.0]])
    np.testing.assert_allclose(numerics.running_normalize(state, x), x, rtol=1e-6)


def test_running_statistics_of_a_large_mean_keep_their_variance():
    x = 1e4 + jnp.asarray([[-1.0], [1.0]])
    state = numerics.running_update(numerics.running_init((1,)), x, jnp.ones(2))
    np.testing.assert_allclose(state.variance, [1.0], rtol=1e-4)
