"""`jax.lax` with mixed operands: tables, caches and padding values that are float32 for sure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from battery.operands import hidden

TABLE = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
CACHE = np.ones((4, 8), np.float32)
ROWS = np.array([[1], [3]], np.int32)
ONTO_ROWS = lax.ScatterDimensionNumbers((1,), (0,), (0,))
DOT = (((1,), (0,)), ((), ()))
WINDOW = {"window_dimensions": (1, 2), "window_strides": (1, 1), "padding": "SAME"}


def scatter(name):
  return lambda w, x: getattr(lax, name)(CACHE, ROWS, hidden(w, x), ONTO_ROWS)


def image(w, x):
  """A batch of one, 8 by 8, two channels."""
  return jnp.stack([w @ w, jnp.outer(x[0], x[1])], -1)[None]


def kernel(w, width=2, inputs=2, outputs=4):
  return w.reshape(-1)[: width * width * inputs * outputs].reshape(width, width, inputs, outputs)


def conv(w, x, *, inputs=2, **options):
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  return lax.conv_general_dilated(
    image(w, x), kernel(w, inputs=inputs), dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


def batch_grouped_conv(w, x):
  images = jnp.concatenate([image(w, x)] * 2)
  return lax.conv_general_dilated(
    images,
    kernel(w),
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    batch_group_count=2,
  )


def log_add(a, b):
  return jnp.logaddexp(a, b)


BINARY = ("add", "sub", "mul", "max", "min", "atan2", "div")


def with_table(name):
  return lambda w, x: getattr(lax, name)(hidden(w, x), TABLE + 2)


CASES = {
  **{f"lax.{name}": with_table(name) for name in BINARY},
  "lax.rem": lambda w, x: lax.rem(hidden(w, x), TABLE + 3),
  "lax.pow": lambda w, x: lax.pow(hidden(w, x), TABLE),
  "lax.lt": lambda w, x: lax.lt(hidden(w, x), TABLE + 2),
  "lax.clamp": lambda w, x: lax.clamp(np.float32(-0.5), x @ w, TABLE + 2),
  "lax.select": lambda w, x: lax.select(x > 0, x @ w, TABLE),
  "lax.select_n": lambda w, x: lax.select_n((x > 0).astype(jnp.int32), x @ w, TABLE, x),
  "lax.concatenate": lambda w, x: lax.concatenate([x @ w, TABLE, x], 0),
  "lax.pad": lambda w, x: lax.pad(x @ w, np.float32(0.5), ((1, 1, 0), (0, 0, 1))),
  "lax.pad_negative": lambda w, x: lax.pad(x @ w, np.float32(1e30), ((0, 0, 0), (-1, 1, 0))),
  "lax.update_cache": lambda w, x: lax.dynamic_update_slice(CACHE, x @ w, (1, 0)),
  "lax.update_zeros": lambda w, x: lax.dynamic_update_slice(jnp.zeros((4, 8)), x @ w, (0, 0)),
  "lax.update_index": lambda w, x: lax.dynamic_update_index_in_dim(CACHE, (x @ w)[0], 2, 0),
  "lax.dynamic_slice": lambda w, x: lax.dynamic_slice(x @ w, (jnp.int32(1), 2), (1, 4)),
  **{
    f"lax.{name}": scatter(name)
    for name in (
      "scatter",
      "scatter_add",
      "scatter_sub",
      "scatter_mul",
      "scatter_max",
      "scatter_min",
    )
  },
  "lax.scatter_apply": lambda w, x: lax.scatter_apply(
    x @ w, ROWS[:1] * 0, jnp.sin, dimension_numbers=ONTO_ROWS, update_shape=(1, 8)
  ),
  "numpy.at_add": lambda w, x: jnp.zeros((4, 8)).at[jnp.array([1, 1])].add(x @ w),
  "numpy.at_set": lambda w, x: jnp.asarray(CACHE).at[jnp.array([1, 2])].set(x @ w),
  "numpy.at_set_narrow": lambda w, x: (w @ w).at[jnp.array([1, 2])].set(TABLE),
  "numpy.at_multiply": lambda w, x: (w @ w).at[0].multiply(TABLE[0]),
  "numpy.at_get": lambda w, x: (w @ w).at[jnp.array([1, 9])].get(mode="fill", fill_value=-1e9),
  "numpy.at_apply": lambda w, x: (w @ w).at[1].apply(jnp.tanh),
  "lax.reduce": lambda w, x: lax.reduce(x @ w, np.float32(0), lax.add, (0,)),
  "lax.reduce_custom": lambda w, x: lax.reduce(x @ w, np.float32(-np.inf), log_add, (1,)),
  "lax.reduce_pair": lambda w, x: lax.reduce(
    (x @ w, TABLE),
    (np.float32(0), np.float32(1)),
    lambda a, b: (a[0] + b[0], a[1] * b[1] + 0 * a[0]),
    (1,),
  ),
  "lax.reduce_max": lambda w, x: lax.reduce(x @ w, np.float32(-1e30), lax.max, (1,)),
  "lax.reduce_window": lambda w, x: lax.reduce_window(x @ w, np.float32(0), lax.add, **WINDOW),
  "lax.reduce_window_custom": lambda w, x: lax.reduce_window(
    x @ w, np.float32(-1e30), log_add, **WINDOW
  ),
  "lax.max_pool": lambda w, x: lax.reduce_window(x @ w, np.float32(-np.inf), lax.max, **WINDOW),
  "lax.sort": lambda w, x: lax.sort(x @ w),
  "lax.sort_mixed": lambda w, x: lax.sort((x, x @ w, TABLE, jnp.arange(16).reshape(2, 8))),
  "lax.sort_key_val": lambda w, x: lax.sort_key_val(x, x @ w)[1],
  "lax.top_k": lambda w, x: lax.top_k(x @ w, 3)[0],
  "lax.approx_max_k": lambda w, x: lax.approx_max_k(x @ w, 3)[0],
  "lax.argmax": lambda w, x: lax.argmax(3 * x + 0 * (x @ w), 1, jnp.int32),
  "lax.cumsum": lambda w, x: lax.cumsum(x @ w, 1, reverse=True),
  "lax.cumprod": lambda w, x: lax.cumprod(hidden(w, x), 1),
  "lax.cummax": lambda w, x: lax.cummax(x @ w, 1),
  "lax.cumlogsumexp": lambda w, x: lax.cumlogsumexp(x @ w, 1),
  "lax.conv": conv,
  "lax.conv_strided": functools.partial(conv, window_strides=(2, 1), padding=((1, 0), (0, 1))),
  "lax.conv_input_dilated": functools.partial(conv, lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
  "lax.conv_kernel_dilated": functools.partial(conv, rhs_dilation=(2, 1)),
  "lax.conv_grouped": functools.partial(conv, inputs=1, feature_group_count=2),
  "lax.conv_batch_grouped": batch_grouped_conv,
  "lax.conv_transpose": lambda w, x: lax.conv_transpose(
    image(w, x), kernel(w), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ),
  "lax.conv_wide_result": functools.partial(conv, preferred_element_type=jnp.float32),
  "lax.conv_patches": lambda w, x: lax.conv_general_dilated_patches(
    image(w, x), (2, 2), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ),
  "lax.conv_local": lambda w, x: lax.conv_general_dilated_local(
    (x @ w)[:, :, None],
    jnp.tile(w[:4, :1], (1, 1)).reshape(1, 4, 1)[:, :2].repeat(7, 0),
    (1,),
    "VALID",
    (2,),
    dimension_numbers=("NHC", "HIO", "NHC"),
  ),
  "lax.dot": lambda w, x: lax.dot(x, w),
  "lax.batch_matmul": lambda w, x: lax.batch_matmul(jnp.stack([x, x]), jnp.stack([w, w])),
  "lax.dot_wide_result": lambda w, x: lax.dot_general(
    x, w, DOT, preferred_element_type=jnp.float32
  ),
  "lax.dot_narrow_result": lambda w, x: lax.dot_general(
    x, w, DOT, preferred_element_type=jnp.bfloat16
  ),
  "lax.dot_highest": lambda w, x: lax.dot_general(x, w, DOT, precision="highest"),
  "lax.dot_two_precisions": lambda w, x: lax.dot_general(x, w, DOT, precision=("high", "default")),
  "lax.dot_algorithm": lambda w, x: lax.dot_general(
    x, w, DOT, precision=lax.DotAlgorithmPreset.F32_F32_F32
  ),
  "lax.dot_mixed": lambda w, x: lax.dot(
    x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32
  ),
  "lax.default_matmul_precision": lambda w, x: jax.default_matmul_precision("highest")(jnp.dot)(
    x, w
  ),
  "lax.ragged_dot": lambda w, x: lax.ragged_dot(x, jnp.stack([w, w]), jnp.array([1, 1])),
  "lax.optimization_barrier": lambda w, x: lax.optimization_barrier((x @ w, x))[0],
  "lax.bitcast": lambda w, x: lax.bitcast_convert_type(
    lax.bitcast_convert_type(x @ w, jnp.int32), jnp.float32
  ),
  "lax.reduce_precision": lambda w, x: lax.reduce_precision(x @ w, 5, 4),
  "lax.complex": lambda w, x: lax.complex(x @ w, TABLE),
  "lax.erf_inv": lambda w, x: lax.erf_inv(hidden(w, x)),
  "lax.integer_pow": lambda w, x: lax.integer_pow(x @ w, 3),
  "lax.rsqrt": lambda w, x: lax.rsqrt(hidden(w, x)),
  "lax.is_finite": lambda w, x: lax.is_finite(x @ w),
  "lax.round": lambda w, x: lax.round(x) + 0 * (x @ w),
  "lax.split": lambda w, x: lax.split(x @ w, (3, 5), 1)[1],
  "lax.rng_uniform": lambda w, x: (
    lax.rng_uniform(np.float32(0), np.float32(1), (2, 8)).shape[0] * (x @ w)
  ),
  "lax.expand_and_collapse": lambda w, x: lax.collapse(lax.expand_dims(x @ w, (0,)), 0, 2),
  "lax.composite": lambda w, x: lax.composite(lambda a, b: jnp.tanh(a @ b), "test.tanh_dot")(x, w),
  "lax.platform_dependent": lambda w, x: lax.platform_dependent(
    x, cpu=lambda x: x @ w, default=lambda x: 2 * (x @ w)
  ),
}

FORWARD_ONLY = {
  "lax.scatter_mul",
  "lax.scatter_apply",
  "numpy.at_apply",
  "lax.lt",
  "lax.argmax",
  "lax.is_finite",
  "lax.reduce_custom",
  "lax.reduce_pair",
  "lax.reduce_window_custom",
  "lax.composite",
  "lax.bitcast",
}
