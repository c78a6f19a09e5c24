"""The operations of random programs: what they take, and what they are in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name

from _program_blocks import NESTED
from _program_types import STRAY, Op


def far(a):
  """A number that masks: plain JAX warns of one beyond the format."""
  return -1e9 if jnp.finfo(a.dtype).max > 1e9 else -1e4


def axis_of(knob: int, a: Any) -> int | None:
  return (None, -1, 0)[knob % 3] if a.ndim else None


def gram(a: Any) -> Any:
  """A positive definite matrix."""
  return a @ a.T + 5 * jnp.eye(a.shape[0], dtype=a.dtype)


def conv(knob: int, a: Any, kernel: Any) -> Any:
  return lax.conv_general_dilated(
    a[None, None],
    kernel[None, None, :2, :2],
    (1 + knob % 2, 1),
    "SAME",
    rhs_dilation=(1, 1 + knob // 4),
  )[0, 0]


def attention(knob: int, q: Any, k: Any) -> Any:
  mask = np.tril(np.ones((q.shape[0], k.shape[0]), bool)) | (knob % 2 == 0)
  low = (-1e9, -jnp.inf, np.finfo(np.float32).min, -1e4)[knob // 2]
  return nn.softmax(jnp.where(mask, q @ k.T / np.sqrt(4), low), -1) @ k


def angles(knob: int, a: Any) -> Any:
  """Far positions, each times each of some frequencies, in the ways of writing an outer product."""
  positions = 1001 + jnp.arange(a.shape[0], dtype=jnp.float32)
  rates = 0.25 ** jnp.arange(a.shape[1], dtype=jnp.float32)
  product = (
    lambda: jnp.einsum("t,k->tk", positions, rates),
    lambda: jnp.tensordot(positions, rates, 0),
    lambda: positions[:, None] @ rates[None],
    lambda: lax.dot_general(positions[:, None], rates[:, None], (((1,), (1,)), ((), ()))),
  )[knob % 4]()
  turned = jnp.cos(product) if knob < 4 else jnp.sin(product)
  return a * turned.astype(a.dtype)


def cast(dtype: Any) -> Callable[..., Any]:
  return lambda knob, a: a.astype(dtype)


def unary(fn: Callable[[Any], Any]) -> Op:
  return Op(("F",), lambda knob, a: fn(a))


def binary(fn: Callable[[Any, Any], Any]) -> Op:
  return Op(("F", "F"), lambda knob, a, b: fn(a, b))


def reduction(fn: Callable[..., Any]) -> Op:
  return Op(("V",), lambda knob, a: fn(a, axis=axis_of(knob, a), keepdims=bool(knob // 4)))


def from_matrix(fn: Callable[[Any], Any]) -> Op:
  return Op(("S",), lambda knob, a: fn(a))


ELEMENTWISE = {
  "tanh": unary(jnp.tanh),
  "sin": unary(jnp.sin),
  "sigmoid": unary(nn.sigmoid),
  "erf": unary(lax.erf),
  "gelu": unary(nn.gelu),
  "softplus": unary(nn.softplus),
  "half": unary(lambda a: 0.5 * a),
  "neg": unary(lambda a: -a),
  "stray": unary(lambda a: a * STRAY),
  "gauss": unary(lambda a: jnp.exp(-(a**2))),
  "log": unary(lambda a: jnp.log(jnp.abs(a) + 1.0)),
  "rsqrt": unary(lambda a: lax.rsqrt(a * a + 1e-6 + 1)),
  "cube": unary(lambda a: jnp.tanh(a) ** 3),
  "average": binary(lambda a, b: 0.5 * (a + b)),
  "mul": binary(lambda a, b: jnp.tanh(a) * b),
}
ROUGH = {
  "exp": unary(jnp.exp),
  "relu": unary(nn.relu),
  "sqrt": unary(lambda a: jnp.sqrt(jnp.abs(a))),
  "square": unary(jnp.square),
  "power": unary(lambda a: jnp.abs(a) ** 1.5),
  "round": unary(jnp.round),
  "sign": unary(jnp.sign),
  "clip": unary(lambda a: jnp.clip(a, -1e6, 1 - 1e-5)),
  "eps": unary(lambda a: a / (jnp.abs(a) + 1e-12)),
  "logit": unary(lambda a: jnp.log(1 - nn.sigmoid(a) + 1e-7)),
  "digamma": unary(lambda a: jax.scipy.special.digamma(1 + a**2)),
  "erf_inv": unary(lambda a: lax.erf_inv(0.9 * jnp.tanh(a))),
  "div": binary(lambda a, b: a / (1 + b**2)),
  "maximum": binary(jnp.maximum),
  "sub": binary(jnp.subtract),
  "atan2": binary(lambda a, b: jnp.arctan2(a, 1 + b**2)),
  "lax_add": Op(("W", "W="), lambda knob, a, b: lax.add(a, b)),
  "lax_clamp": Op(("W", "W="), lambda knob, a, b: lax.clamp(np.float32(-1), a, lax.abs(b))),
  "lax_select": Op(("W", "W="), lambda knob, a, b: lax.select(a > b, a, b)),
  "rem": binary(lambda a, b: a % (1 + b**2)),
}


def dot(knob: int, a: Any, b: Any) -> Any:
  return 0.5 * lax.dot(a, b, precision=(None, "highest")[knob % 2])


def segment_sum(knob: int, a: Any, i: Any) -> Any:
  return jax.ops.segment_sum(a[: i.size], i.reshape(-1), 4)


def where(knob: int, a: Any, m: Any) -> Any:
  return jnp.where(m, a, (-1e9, 0.0, -jnp.inf, 1e30)[knob % 4])


CONTRACT = {
  "matmul": Op(("V", "M@"), lambda knob, a, b: 0.5 * (a @ b)),
  "dot": Op(("W", "W@"), dot),
  "wide_dot": Op(
    ("W", "W@"),
    lambda knob, a, b: lax.dot(a, b, preferred_element_type=(jnp.float32, None)[knob % 2]),
  ),
  "transposed": Op(("M", "M"), lambda knob, a, b: 0.5 * jnp.einsum("ij,kj->ik", a, b)),
  "outer": Op(("V", "V"), lambda knob, a, b: jnp.outer(a[..., 0], b[..., -1])),
  "angles": Op(("M",), angles),
  "conv": Op(("M", "M"), conv),
  "attention": Op(("M", "M"), attention),
  "tensordot": Op(("V", "V="), lambda knob, a, b: 0.2 * jnp.tensordot(a, b, a.ndim)),
  "ragged_dot": Op(
    ("M", "S"), lambda knob, a, b: lax.ragged_dot(a, b[None], jnp.full((1,), a.shape[0], jnp.int32))
  ),
}  # fmt: skip
REDUCE = {
  "mean": reduction(jnp.mean),
  "softmax": Op(("V",), lambda knob, a: nn.softmax((1 + knob) * a, axis_of(knob, a) or -1)),
  "log_softmax": Op(("V",), lambda knob, a: 0.3 * nn.log_softmax(a, -1)),
  "normalize": Op(("V",), lambda knob, a: nn.standardize(a, -1, epsilon=0.5)),
  "rms": Op(("V",), lambda knob, a: a * lax.rsqrt(jnp.mean(a**2, -1, keepdims=True) + 1e-3)),
  "long_mean": unary(lambda a: jnp.mean(jnp.tile(a[..., None], 300), -1)),
  "long_softmax": unary(
    lambda a: jnp.sum(nn.softmax(a[..., None] * np.linspace(-1, 1, 300, dtype=np.float32)), -1) * a
  ),
  "long_cumsum": unary(lambda a: jnp.cumsum(jnp.tile(a[..., None], 300) / 300, -1)[..., -1]),
}
REDUCE_ROUGH = {
  "sum": reduction(jnp.sum),
  "max": reduction(jnp.max),
  "var": reduction(jnp.var),
  "prod": reduction(jnp.prod),
  "logsumexp": reduction(nn.logsumexp),
  "norm": Op(("V",), lambda knob, a: jnp.linalg.norm(a, axis=-1, keepdims=True)),
  "cumsum": Op(("V",), lambda knob, a: jnp.cumsum(a, -1)),
  "cumprod": Op(("V",), lambda knob, a: jnp.cumprod(a, -1)),
  "cummax": Op(("V",), lambda knob, a: lax.cummax(a, 0)),
  "cumlogsumexp": Op(("V",), lambda knob, a: lax.cumlogsumexp(a, 0, reverse=bool(knob % 2))),
  "sort": Op(("V",), lambda knob, a: jnp.sort(a, -1)),
  "sort_pair": Op(("V", "V="), lambda knob, a, b: lax.sort((a, b), num_keys=1)[1]),
  "top_k": Op(("V",), lambda knob, a: lax.top_k(a, 1 + knob % 2)[0]),
  "median": Op(("V",), lambda knob, a: jnp.median(a, axis=-1)),
  "associative_scan": Op(("V",), lambda knob, a: lax.associative_scan(jnp.add, a)),
  "reduce_window": Op(
    ("W",),
    lambda knob, a: lax.reduce_window(
      a, np.float32((0, -np.inf)[knob % 2]), (lax.add, lax.max)[knob % 2], (2,) * a.ndim,
      (1,) * a.ndim, "SAME",
    ),
  ),
  "reduce": Op(("W",), lambda knob, a: lax.reduce(a, np.float32(0), lax.add, (0,))),
}  # fmt: skip
MOVE = {
  "transpose": Op(("V",), lambda knob, a: a.T),
  "flip": Op(("V",), lambda knob, a: jnp.flip(a, 0)),
  "first": Op(("V",), lambda knob, a: a[0]),
  "flat": Op(("V",), lambda knob, a: a.reshape(-1)),
  "slice": Op(("V",), lambda knob, a: a[..., : 1 + knob % 4]),
  "concat": Op(("V", "V"), lambda knob, a, b: jnp.concatenate([a, b], 0)),
  "stack": Op(("F", "F="), lambda knob, a, b: jnp.stack([a, b])),
  "pad": Op(("W",), lambda knob, a: lax.pad(a, STRAY, [(1, 0, knob % 2)] * a.ndim)),
  "row_of": Op(("M",), lambda knob, a: jnp.broadcast_to(a[:1], a.shape)),
}
INDEX = {
  "take": Op(("V", "I"), lambda knob, a, i: a[i % 3]),
  "take_far": Op(("V", "I"), lambda knob, a, i: a.at[i + 2].get(mode="fill", fill_value=far(a))),
  "dynamic_slice": Op(("V", "N"), lambda knob, a, i: lax.dynamic_slice_in_dim(a, i, 2)),
  "update": Op(("V", "N"), lambda knob, a, i: lax.dynamic_update_slice_in_dim(a, a[:1], i, 0)),
  "into_cache": Op(
    ("M", "N"),
    lambda knob, a, i: lax.dynamic_update_slice(
      np.ones((5, 4), np.float32), a[:2, :4].astype(jnp.float32), (i, 0)
    ),
  ),
  "at_add": Op(("V", "I"), lambda knob, a, i: a.at[i].add(0.5)),
  "scatter_add": Op(("M", "I"), lambda knob, a, i: jnp.zeros((5, a.shape[1])).at[i].add(a[0])),
  "scatter_set": Op(("M", "I"), lambda knob, a, i: jnp.ones((5, a.shape[1])).at[i].set(a[0])),
  "scatter_max": Op(("M", "I"), lambda knob, a, i: jnp.ones((5, a.shape[1])).at[i].max(a[0])),
  "segment_sum": Op(("M", "I"), segment_sum),
  "one_hot": Op(("I",), lambda knob, i: nn.one_hot(i, 4)),
  "positions": Op(("I",), lambda knob, i: i.astype(jnp.float32) / 3),
  "argmax": Op(("V",), lambda knob, a: jnp.argmax(a, -1)),
  "argsort": Op(("V",), lambda knob, a: jnp.argsort(a, -1)),
  "plus_one": Op(("I",), lambda knob, i: i + 1),
  "to_int": Op(("F",), lambda knob, a: a.astype(jnp.int32)),
  "int_matmul": Op(("I", "I"), lambda knob, i, j: jnp.dot(i, j)),
}  # fmt: skip
MASK = {
  "greater": Op(("F", "F"), lambda knob, a, b: a > b),
  "not": Op(("B",), lambda knob, m: ~m),
  "any": Op(("B",), lambda knob, m: jnp.any(m, -1) if m.ndim else m),
  "isfinite": Op(("F",), lambda knob, a: jnp.isfinite(a)),
  "where": Op(("F", "B="), where),
  "where_both": Op(("F", "B=", "F="), lambda knob, a, m, b: jnp.where(m, a, b)),
  "additive_mask": Op(("F", "B="), lambda knob, a, m: a + (1 - m.astype(a.dtype)) * -1e9),
  "times_mask": Op(("F", "B="), lambda knob, a, m: a * m),
  "chosen": unary(lambda a: a + 0.01 * jnp.where(a > 0, a > 1, False)),
  "forced": Op(("F", "B="), lambda knob, a, m: a + 0.1 * jnp.where(m, False, bool(knob % 2))),
  "causal": Op(("M",), lambda knob, a: a + (1.0 - jnp.tril(jnp.ones(a.shape, bool))) * -1e4),
  "doubled": Op(("F", "B="), lambda knob, a, m: a * jnp.where(m, 2, 1)),
  "by_variance": unary(lambda a: a / jnp.full_like(a, 0.5) ** 2),
}  # fmt: skip
CAST = {
  "to_float32": unary(lambda a: a.astype(jnp.float32)),
  "to_bfloat16": unary(lambda a: a.astype(jnp.bfloat16)),
  "to_float16": unary(lambda a: a.astype(jnp.float16)),
  "reduce_precision": unary(lambda a: lax.reduce_precision(a, 8, 7)),
  "stop_gradient": unary(lax.stop_gradient),
  "barrier": unary(lax.optimization_barrier),
  "named": unary(lambda a: checkpoint_name(a, "kept")),
  "bits": Op(("W",), lambda knob, a: lax.bitcast_convert_type(a, jnp.int32) % 7),
  "nextafter": Op(("W",), lambda knob, a: jnp.nextafter(a, np.float32(2))),
}
LINALG = {
  "cholesky": from_matrix(lambda a: jnp.linalg.cholesky(gram(a))),
  "solve": Op(("S", "S="), lambda knob, a, b: jnp.linalg.solve(gram(a), b)),
  "triangular_solve": Op(
    ("S", "S="), lambda knob, a, b: jax.scipy.linalg.solve_triangular(gram(a), b)
  ),
  "inv": from_matrix(lambda a: jnp.linalg.inv(gram(a))),
  "qr": from_matrix(lambda a: jnp.linalg.qr(gram(a))[1]),
  "svd": from_matrix(lambda a: jnp.linalg.svd(a, compute_uv=False)),
  "eigh": from_matrix(lambda a: jnp.linalg.eigh(gram(a))[0]),
  "det": from_matrix(lambda a: jnp.linalg.det(gram(a) / 9)),
}
COMPLEX = {
  "fft": Op(("V",), lambda knob, a: jnp.fft.fft(a)),
  "rfft": Op(("V",), lambda knob, a: jnp.fft.irfft(jnp.fft.rfft(a))),
  "to_complex": Op(("W",), lambda knob, a: lax.complex(a, lax.neg(a))),
  "phase": unary(lambda a: jnp.exp(1j * a)),
  "abs": Op(("C",), lambda knob, z: jnp.abs(z + 0.1)),
  "real": Op(("C",), lambda knob, z: (z.real, z.imag)[knob % 2]),
  "rotate": Op(("C", "F"), lambda knob, z, a: z * a),
  "complex_matmul": Op(("C", "M"), lambda knob, z, a: z @ a),
}
RANDOM = {
  "split": Op(("K",), lambda knob, k: jax.random.split(k)[0]),
  "noise": Op(("K", "F"), lambda knob, k, a: a + 0.1 * jax.random.normal(k, a.shape)),
  "dropout": Op(
    ("K", "F"), lambda knob, k, a: jnp.where(jax.random.bernoulli(k, 0.5, a.shape), a / 0.5, 0)
  ),
  "categorical": Op(("K", "V"), lambda knob, k, a: jax.random.categorical(k, a)),
  "gamma": Op(("K", "F"), lambda knob, k, a: jax.random.gamma(k, 1 + a**2)),
}

OPS: dict[str, Op] = {
  **ELEMENTWISE, **ROUGH, **CONTRACT, **REDUCE, **REDUCE_ROUGH, **MOVE, **INDEX, **MASK, **CAST,
  **LINALG, **COMPLEX, **RANDOM, **NESTED,
}  # fmt: skip

TAME = [
  *ELEMENTWISE, *REDUCE, "matmul", "transposed", "angles", "conv", "attention", "tensordot",
  "transpose", "flip", "concat", "stack",
  *(name for name in NESTED if name not in ("cond", "fori_dynamic")),
]  # fmt: skip
"""Operations through which an error of the operands passes about as large as it is."""
