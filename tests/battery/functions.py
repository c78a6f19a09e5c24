"""All of `jax.nn`, and what else of `jax.numpy`, `jax.random` and `jax.image` models call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import nn

from battery.operands import hidden

KEY = jax.random.key(7)


def heads(w, x, count=2):
  """Queries, keys or values: batch 1, length 8, ``count`` heads of width 4."""
  return jnp.tile(x @ w, (1, 2 * count)).reshape(1, 8, count, 4)


def attention(w, x, *, kv_heads=2, **options):
  return nn.dot_product_attention(
    heads(w, x), heads(w, x, kv_heads), 0.5 * heads(w, x, kv_heads), **options
  )


CAUSAL = np.tril(np.ones((1, 1, 8, 8), bool))
BIAS = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)

# Activations of an array, by their name in jax.nn.
ACTIVATIONS = (
  "celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu log_sigmoid "
  "log_softmax logmeanexp logsumexp mish relu relu6 selu sigmoid silu soft_sign softmax softplus "
  "sparse_plus sparse_sigmoid squareplus standardize swish tanh"
)


def activation(name):
  return lambda w, x: getattr(nn, name)(x @ w)


# Draws that depend on a value: through their parameters.
DRAWS = {
  "bernoulli": lambda w, x: jax.random.bernoulli(KEY, hidden(w, x)),
  "beta": lambda w, x: jax.random.beta(KEY, 1 + hidden(w, x), 2.0),
  "binomial": lambda w, x: jax.random.binomial(KEY, 8.0, hidden(w, x)),
  "categorical": lambda w, x: jax.random.categorical(KEY, x @ w),
  "dirichlet": lambda w, x: jax.random.dirichlet(KEY, 1 + hidden(w, x)),
  "exponential": lambda w, x: (x @ w) * jax.random.exponential(KEY, (2, 8)),
  "gamma": lambda w, x: jax.random.gamma(KEY, 1 + hidden(w, x)),
  "gumbel": lambda w, x: (x @ w) + jax.random.gumbel(KEY, (2, 8)),
  "multivariate_normal": lambda w, x: jax.random.multivariate_normal(
    KEY, (x @ w)[0], jnp.eye(8) + 0.1 * w @ w.T
  ),
  "normal": lambda w, x: x @ w + jax.random.normal(KEY, (2, 8)),
  "permutation": lambda w, x: jax.random.permutation(KEY, x @ w, axis=1),
  "poisson": lambda w, x: jax.random.poisson(KEY, 3 * hidden(w, x)),
  "randint": lambda w, x: (x @ w)[:, jax.random.randint(KEY, (3,), 0, 8)],
  "split_and_fold": lambda w, x: sum(
    (x @ w) * jax.random.uniform(jax.random.fold_in(k, 1)) for k in jax.random.split(KEY, 2)
  ),
  "t": lambda w, x: jax.random.t(KEY, 3 + hidden(w, x)),
  "truncated_normal": lambda w, x: jax.random.truncated_normal(KEY, -1 - hidden(w, x), 2.0),
  "dropout": lambda w, x: jnp.where(jax.random.bernoulli(KEY, 0.5, (2, 8)), x @ w / 0.5, 0),
}

CASES = {
  **{f"nn.{name}": activation(name) for name in ACTIVATIONS.split()},
  "nn.gelu_exact": lambda w, x: nn.gelu(x @ w, approximate=False),
  "nn.log1mexp": lambda w, x: nn.log1mexp(hidden(w, x)),
  "nn.one_hot": lambda w, x: nn.one_hot(jnp.array([1, 2]), 8) @ w,
  "nn.softmax_where": lambda w, x: nn.softmax(x @ w, where=x > 0),
  "nn.logsumexp_weighted": lambda w, x: nn.logsumexp(x @ w, b=jnp.exp(x), axis=-1),
  "nn.dot_product_attention": attention,
  "nn.attention_mask": functools.partial(attention, mask=CAUSAL),
  "nn.attention_causal": functools.partial(attention, is_causal=True),
  "nn.attention_bias": functools.partial(attention, bias=BIAS),
  "nn.attention_bias_and_mask": functools.partial(attention, bias=BIAS, mask=CAUSAL),
  "nn.attention_grouped": functools.partial(attention, kv_heads=1),
  "nn.attention_lengths": functools.partial(
    attention,
    query_seq_lengths=np.array([6], np.int32),
    key_value_seq_lengths=np.array([5], np.int32),
  ),
  "nn.attention_window": functools.partial(attention, local_window_size=2),
  "numpy.interp": lambda w, x: jnp.interp(x @ w, jnp.linspace(-9.0, 9.0, 5), jnp.arange(5.0)),
  "numpy.convolve": lambda w, x: jnp.convolve(x[0], w[0]),
  "numpy.correlate": lambda w, x: jnp.correlate((x @ w)[0], x[0], mode="full"),
  "numpy.polyval": lambda w, x: jnp.polyval(jnp.arange(3.0), x @ w),
  "numpy.polyfit": lambda w, x: jnp.polyfit(jnp.linspace(-1.0, 1.0, 8), (x @ w)[0], 2),
  "numpy.einsum": lambda w, x: jnp.einsum("bi,ij,kj->bk", x, w, w),
  "numpy.einsum_trace": lambda w, x: jnp.einsum("ii,bi->b", w, x),
  "numpy.kron": lambda w, x: jnp.kron(x, w[:2]),
  "numpy.where": lambda w, x: jnp.where(x @ w > 0, x @ w, -1e9),
  "numpy.select": lambda w, x: jnp.select([x > 0, x > -1], [x @ w, 2 * (x @ w)], 0.5),
  "numpy.piecewise": lambda w, x: jnp.piecewise(x @ w, [x > 0], [jnp.sin, 2.0]),
  "numpy.clip": lambda w, x: jnp.clip(x @ w, -1e6, 1e6),
  "numpy.round": lambda w, x: jnp.round(x) + jnp.floor(x) % 3.0 + 0 * (x @ w),
  "numpy.median": lambda w, x: jnp.median(x @ w),
  "numpy.quantile": lambda w, x: jnp.quantile(x @ w, 0.3),
  "numpy.nanmean": lambda w, x: jnp.nanmean(jnp.where(x > 1, jnp.nan, x @ w)),
  "numpy.std": lambda w, x: jnp.std(x @ w, axis=-1, ddof=1),
  "numpy.cov": lambda w, x: jnp.cov(x @ w),
  "numpy.histogram": lambda w, x: jnp.histogram(x, bins=4, weights=x @ w)[0],
  "numpy.digitize": lambda w, x: jnp.digitize(x, jnp.array([-0.5, 0.5])) * (x @ w),
  "numpy.unwrap": lambda w, x: jnp.unwrap(x @ w),
  "numpy.trapezoid": lambda w, x: jnp.trapezoid(x @ w, dx=0.5),
  "numpy.gradient": lambda w, x: jnp.gradient(x @ w, axis=1),
  "numpy.diff": lambda w, x: jnp.diff(x @ w, prepend=0.0),
  "numpy.cumprod": lambda w, x: jnp.cumprod(hidden(w, x)),
  "numpy.hypot": lambda w, x: jnp.hypot(x @ w, 1.0),
  "numpy.logaddexp": lambda w, x: jnp.logaddexp(x @ w, x),
  "numpy.sinc": lambda w, x: jnp.sinc(x @ w),
  "numpy.float_power": lambda w, x: jnp.float_power(hidden(w, x), 2.5),
  "numpy.power_of_arrays": lambda w, x: hidden(w, x) ** x,
  "numpy.arctan2": lambda w, x: jnp.arctan2(x @ w, 2.0),
  "numpy.nan_to_num": lambda w, x: jnp.nan_to_num(x @ w),
  "numpy.take_along_axis": lambda w, x: jnp.take_along_axis(x @ w, jnp.array([[1], [2]]), 1),
  "numpy.put_along_axis": lambda w, x: jnp.put_along_axis(
    x @ w, jnp.array([[1], [2]]), 3.0, 1, inplace=False
  ),
  "numpy.apply_along_axis": lambda w, x: jnp.apply_along_axis(jnp.cumsum, 1, x @ w),
  "numpy.vectorize": lambda w, x: jnp.vectorize(lambda a, b: a @ b, signature="(n),(n)->()")(
    x @ w, x
  ),
  "numpy.frexp": lambda w, x: jnp.frexp(hidden(w, x))[0],
  "numpy.nextafter": lambda w, x: jnp.nextafter(x @ w, 1.0),
  "numpy.modf": lambda w, x: jnp.modf(0.5 * hidden(w, x))[0],
  "numpy.to_int": lambda w, x: ((x @ w) * 0).astype(jnp.int32),
  "numpy.to_float16": lambda w, x: (x @ w).astype(jnp.float16) * jnp.float16(2),
  "numpy.integer_matmul": lambda w, x: (10 * x).astype(jnp.int32) @ jnp.ones((8, 2), jnp.int32),
  "numpy.complex": lambda w, x: jnp.abs((x @ w) * jnp.exp(1j * (x @ w))),
  "numpy.complex_matmul": lambda w, x: (x + 1j * x) @ (w - 2j * w),
  "numpy.complex_by_real_matmul": lambda w, x: ((x @ w) + 1j * x) @ w,
  "numpy.angle": lambda w, x: jnp.angle((x @ w) + 3 + 1j * hidden(w, x)),
  "numpy.real_of_complex": lambda w, x: ((x @ w) * 1j).imag + jnp.conj(x + 0j).real,
  **{f"random.{name}": draw for name, draw in DRAWS.items()},
  "image.resize": lambda w, x: jax.image.resize(x @ w, (4, 6), "bilinear"),
  "image.resize_cubic": lambda w, x: jax.image.resize(x @ w, (3, 16), "cubic"),
  "image.nearest": lambda w, x: jax.image.resize(x @ w, (4, 4), "nearest"),
  "image.scale_and_translate": lambda w, x: jax.image.scale_and_translate(
    w @ w, (4, 4), (0, 1), (x @ w)[0, :2] * 0 + 0.5, jnp.zeros(2), "linear"
  ),
  "ndimage.map_coordinates": lambda w, x: jax.scipy.ndimage.map_coordinates(
    w @ w, [1.5 + jnp.tanh(x[0]), 2 + jnp.tanh(x[1])], order=1
  ),
  "signal.convolve2d": lambda w, x: jax.scipy.signal.convolve2d(w, w[:2, :2], mode="same"),
  "signal.fftconvolve": lambda w, x: jax.scipy.signal.fftconvolve(x @ w, x),
  "signal.stft": lambda w, x: jax.scipy.signal.stft((x @ w).reshape(-1), nperseg=8)[2],
  "ops.segment_sum": lambda w, x: jax.ops.segment_sum(x @ w, jnp.array([0, 0]), 3),
  "ops.segment_max": lambda w, x: jax.ops.segment_max(x @ w, jnp.array([0, 1]), 2),
}

FORWARD_ONLY = {
  "random.bernoulli",
  "random.categorical",
  "random.poisson",
  "numpy.to_int",
  "numpy.integer_matmul",
  "numpy.nextafter",
}
