"""Control flow, custom rules, transformations, callbacks and references around a matmul."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.optimize
import jax.scipy.sparse.linalg
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback, sparse
from jax.experimental import pallas as pl
from jax.experimental.ode import odeint

import mpjax

WIDE = np.full((2, 8), 0.5, np.float32)
ONE = np.float32(1)


def layer(w, x):
  return jnp.tanh(x @ w)


def positive_map(w):
  return lambda v: (w @ w.T + 9 * jnp.eye(8)) @ v


def call_kernel(body, out, *operands):
  shape = jax.ShapeDtypeStruct(out.shape, out.dtype)
  return pl.pallas_call(body, out_shape=shape, interpret=True)(*operands)


def scale_kernel(a_ref, o_ref):
  o_ref[...] = 2.0 * a_ref[...]


def matmul_kernel(a_ref, b_ref, o_ref):
  o_ref[...] = jnp.dot(a_ref[...], b_ref[...])


def on_host(w, x, method="sequential", batched=False):
  def call(row):
    aval = jax.ShapeDtypeStruct(row.shape, row.dtype)
    return jax.pure_callback(np.negative, aval, lax.stop_gradient(row), vmap_method=method)

  y = x @ w
  return y + lax.stop_gradient(jax.vmap(call)(y) if batched else call(y))


def io(w, x, ordered):
  y = x @ w
  aval = jax.ShapeDtypeStruct(y.shape, y.dtype)
  return y + io_callback(np.negative, aval, y, ordered=ordered)


def printed(w, x, ordered):
  jax.debug.callback(lambda y: None, x @ w, ordered=ordered)
  return x @ w


def through_reference(w, x):
  ref = jax.new_ref(jnp.zeros((2, 8)))
  ref[...] = x @ w
  ref[0] += WIDE[0]
  return jnp.tanh(ref[...]) @ w


def reference_in_a_loop(w, x):
  ref = jax.new_ref(jnp.zeros((2, 8)))

  def body(_, c):
    ref[...] += c @ w
    return jnp.tanh(c @ w)

  out = lax.fori_loop(0, 2, body, x)
  return out + ref[...]


@jax.custom_batching.custom_vmap
def batched_by_hand(x, w):
  return layer(w, x)


@batched_by_hand.def_vmap
def _(size, batched, x, w):
  assert batched == [True, False]
  return layer(w, x), True


@jax.custom_gradient
def by_custom_gradient(x, w):
  return layer(w, x), lambda ct: (ct @ w.T, 2 * (x.T @ ct))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def by_custom_jvp(power, x, w):
  return layer(w, x) ** power


@by_custom_jvp.defjvp
def _(power, primals, tangents):
  return jax.jvp(lambda x, w: layer(w, x) ** power, primals, tangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_custom_vjp(tree, operands):
  return layer(*operands), {"none": None}


by_custom_vjp.defvjp(
  lambda tree, operands: (by_custom_vjp(tree, operands), (operands, 3)),
  lambda tree, residuals, ct: ((residuals[0][1].T @ ct[0], ct[0] @ residuals[0][0].T),),
)


@jax.custom_vjp
def with_integers(x, w, index):
  return layer(w, x)[index]


def _with_integers_backward(residuals, ct):
  x, w, index = residuals
  dx, dw = jax.vjp(lambda x, w: layer(w, x)[index], x, w)[1](ct)
  return dx, dw, None


with_integers.defvjp(
  lambda x, w, index: (with_integers(x, w, index), (x, w, index)), _with_integers_backward
)


def closed_over(w, x):
  fn, captured = jax.closure_convert(lambda x: layer(w, x), x)

  @jax.custom_vjp
  def call(x, *captured):
    return fn(x, *captured)

  call.defvjp(lambda *args: jax.vjp(fn, *args), lambda pullback, ct: pullback(ct))
  return call(x, *captured)


def table_in_custom_jvp(w, x):
  table = jnp.arange(8.0) / 4  # the rule does not know it
  fn = jax.custom_jvp(lambda y: jnp.tanh(y * table))
  fn.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), 3 * tangents[0]))
  return fn(x @ w)


def table_in_custom_vjp(w, x):
  table = jnp.arange(8.0) / 4
  fn = jax.custom_vjp(lambda y: jnp.tanh(y * table))
  fn.defvjp(lambda y: (jnp.tanh(y), y), lambda y, ct: ((ct @ y.T) @ y,))
  return fn(x @ w)


def root(w, x):
  """The root of ``v + 0.1 tanh(v w) = x``, differentiated implicitly."""
  fn = lambda v: v + 0.1 * layer(w, v) - x
  return lax.custom_root(
    fn,
    x,
    lambda f, v: lax.fori_loop(0, 8, lambda _, v: v - f(v), v),
    lambda g, y: jnp.linalg.solve(jax.jacobian(lambda v: g(v.reshape(2, 8)).reshape(-1))(
      y.reshape(-1)), y.reshape(-1)).reshape(2, 8),
  )  # fmt: skip


def linear_solve(w, x):
  matrix = w @ w.T + 9 * jnp.eye(8)
  solve = lambda matvec, b: jnp.linalg.solve(matrix, b)
  return lax.custom_linear_solve(lambda v: matrix @ v, x[0], solve, symmetric=True)


def stray_while(w, x):
  """The carry starts narrow, and the body widens it."""
  return lax.while_loop(
    lambda c: c[1] < 2, lambda c: (layer(w, c[0]) + WIDE, c[1] + 1), (x @ w, 0)
  )[0]


def dynamic_trips(w, x):
  return lax.fori_loop(0, jnp.int32(2) + (x[0, 0] > 9), lambda _, c: layer(w, c), x)


def sparse_matmul(w, x):
  return sparse.BCOO.fromdense(TRIANGLE, nse=36) @ (w @ w) + 0 * x[0, 0]


TRIANGLE = np.tril(np.ones((8, 8), np.float32))


def donated(w, x):
  step = jax.jit(lambda c, w: layer(w, c) + 1, donate_argnums=0)
  return step(x @ w, w)


def tied(w, x):
  return layer(w, layer(w, x)) @ w.T


def scanned(w, x, **options):
  step = lambda c, s: (layer(w, c) + s, c.sum())
  return lax.scan(step, x, jnp.stack([x, WIDE]), **options)


def saved_names(w, x):
  policy = jax.checkpoint_policies.save_only_these_names("hidden")
  return jax.checkpoint(lambda w, x: jnp.sin(checkpoint_name(x @ w, "hidden")) @ w, policy=policy)(
    w, x
  )


def offloaded(w, x):
  policy = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims
  return jax.checkpoint(lambda w, x: layer(w, layer(w, x)), policy=policy, prevent_cse=False)(w, x)


CASES = {
  "flow.scan": scanned,
  "flow.scan_reverse": functools.partial(scanned, reverse=True),
  "flow.scan_unrolled": functools.partial(scanned, unroll=2),
  "flow.scan_without_carry": lambda w, x: lax.scan(lambda c, r: (c, r @ w), None, x)[1],
  "flow.scan_of_integers": lambda w, x: lax.scan(
    lambda c, i: ((c[0] + i, layer(w, c[1])), c[0]), (0, x), jnp.arange(3)
  ),
  "flow.scan_of_a_key": lambda w, x: lax.scan(
    lambda c, _: (
      (jax.random.split(c[0])[0], layer(w, c[1]) + jax.random.normal(c[0], (2, 8))),
      None,
    ),
    (jax.random.key(0), x),
    None,
    length=2,
  )[0][1],
  "flow.nested_scan": lambda w, x: lax.scan(
    lambda c, _: (scanned(w, c)[0], None), x, None, length=2
  )[0],
  "flow.while_stray": stray_while,
  "flow.fori_dynamic": dynamic_trips,
  "flow.cond_stray": lambda w, x: lax.cond(
    x[0, 0] > 0, lambda h: h, lambda h: h * ONE + WIDE, x @ w
  ),
  "flow.cond_without_operands": lambda w, x: lax.cond(
    x[0, 0] > 0, lambda: x @ w, lambda: jnp.zeros((2, 8))
  ),
  "flow.switch": lambda w, x: lax.switch(
    jnp.int32(2), [lambda h: h, lambda h: WIDE, lambda h: jnp.tanh(h @ w)], x @ w
  ),
  "flow.cond_of_masks": lambda w, x: jnp.where(
    lax.cond(x[0, 0] > 0, lambda: -1e9, lambda: 0.0) < -1, x @ w, 1.0
  ),
  "flow.map": lambda w, x: lax.map(lambda row: jnp.tanh(row @ w), x),
  "flow.map_in_batches": lambda w, x: lax.map(lambda row: row @ w, x, batch_size=2),
  "flow.associative_scan": lambda w, x: lax.associative_scan(jnp.matmul, jnp.stack([w, w, w])),
  "flow.associative_scan_of_pairs": lambda w, x: lax.associative_scan(
    lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]), (jnp.tanh(x @ w), x)
  )[1],
  "flow.jit_static": lambda w, x: jax.jit(lambda n, w: n * (x @ w), static_argnums=0)(2, w),
  "flow.jit_donated": donated,
  "flow.jit_twice": lambda w, x: (jax.jit(layer)(w, x), jax.jit(layer)(2 * w, x)),
  "flow.remat_names": saved_names,
  "flow.remat_dots": offloaded,
  "flow.remat_static": lambda w, x: jax.checkpoint(
    lambda n, w, x: n * layer(w, x), static_argnums=0
  )(2, w, x),
  "flow.remat_in_scan_in_jit": lambda w, x: jax.jit(
    lambda x: lax.scan(lambda c, _: (saved_names(w, c), None), x, None, length=2)[0]
  )(x),
  "flow.tied": tied,
  "custom.gradient": lambda w, x: by_custom_gradient(x, w),
  "custom.jvp_static": lambda w, x: by_custom_jvp(2, x, w),
  "custom.vjp_tree": lambda w, x: by_custom_vjp("static", (w, x)),
  "custom.vjp_integers": lambda w, x: with_integers(x, w, jnp.int32(1)),
  "custom.vjp_vmapped": lambda w, x: jax.vmap(with_integers, (0, None, None))(
    jnp.stack([x, x]), w, jnp.int32(1)
  ),
  "custom.closure_convert": closed_over,
  "custom.jvp_of_a_table": table_in_custom_jvp,
  "custom.vjp_of_a_table": table_in_custom_vjp,
  "custom.vmap": lambda w, x: jax.vmap(batched_by_hand, (0, None))(x, w),
  "custom.vmap_unbatched": lambda w, x: batched_by_hand(x, w),
  "custom.root": root,
  "custom.linear_solve": linear_solve,
  "custom.cg": lambda w, x: jax.scipy.sparse.linalg.cg(positive_map(w), x[0])[0],
  "custom.gmres": lambda w, x: jax.scipy.sparse.linalg.gmres(positive_map(w), x[0])[0],
  "custom.bicgstab": lambda w, x: jax.scipy.sparse.linalg.bicgstab(positive_map(w), x[0])[0],
  "custom.odeint": lambda w, x: odeint(lambda y, t: layer(w, y), x, jnp.linspace(0.0, 0.1, 3)),
  "custom.minimize": lambda w, x: (
    jax.scipy.optimize.minimize(
      lambda v: jnp.sum((v @ w - 1) ** 2) + 9 * jnp.sum(v**2), x[0], method="BFGS"
    ).x
  ),
  "inside.grad": lambda w, x: jax.grad(lambda x: layer(w, x).sum())(x),
  "inside.value_and_grad": lambda w, x: jax.value_and_grad(lambda w: layer(w, x).sum())(w),
  "inside.jvp": lambda w, x: jax.jvp(lambda x: layer(w, x), (x,), (WIDE,)),
  "inside.vjp": lambda w, x: jax.vjp(lambda w: layer(w, x), w)[1](jnp.asarray(WIDE)),
  "inside.linearize": lambda w, x: jax.linearize(lambda x: layer(w, x), x)[1](jnp.asarray(WIDE)),
  "inside.linear_transpose": lambda w, x: jax.linear_transpose(lambda v: v @ w, x)(x @ w),
  "inside.hessian": lambda w, x: jax.hessian(lambda v: layer(w, v).sum())(x[0]),
  "inside.jacrev": lambda w, x: jax.jacrev(lambda v: layer(w, v))(x[0]),
  "inside.jacfwd": lambda w, x: jax.jacfwd(lambda v: layer(w, v))(x[0]),
  "inside.vmap_of_grad": lambda w, x: jax.vmap(jax.grad(lambda r: layer(w, r).sum()))(x),
  "inside.grad_of_grad": lambda w, x: jax.grad(
    lambda v: (jax.grad(lambda u: layer(w, u).sum())(v) ** 2).sum()
  )(x),
  "inside.vmap_with_axis_name": lambda w, x: jax.vmap(
    lambda r: r @ w - lax.pmean(r @ w, "i"), axis_name="i"
  )(x),
  "inside.autocast": lambda w, x: mpjax.autocast(layer, "mixed_float16")(w, x),
  "host.callback": on_host,
  "host.callback_sequential": functools.partial(on_host, batched=True),
  "host.callback_expand_dims": functools.partial(on_host, method="expand_dims", batched=True),
  "host.callback_broadcast": functools.partial(on_host, method="broadcast_all", batched=True),
  "host.io_callback": functools.partial(io, ordered=False),
  "host.io_callback_ordered": functools.partial(io, ordered=True),
  "host.debug": functools.partial(printed, ordered=False),
  "host.debug_ordered": functools.partial(printed, ordered=True),
  "host.debug_in_scan": lambda w, x: lax.scan(
    lambda c, _: (printed(w, c, ordered=False), None), x, None, length=2
  )[0],
  "ref.assigned": through_reference,
  "ref.in_a_loop": reference_in_a_loop,
  "kernel.elementwise": lambda w, x: call_kernel(scale_kernel, x, x @ w),
  "kernel.matmul": lambda w, x: jnp.tanh(call_kernel(matmul_kernel, x, x @ w, w)) @ w,
  "kernel.in_scan": lambda w, x: lax.scan(
    lambda c, _: (call_kernel(scale_kernel, c, layer(w, c)), None), x, None, length=2
  )[0],
  "sparse.bcoo_matmul": sparse_matmul,
  "sparse.bcoo_values": lambda w, x: sparse.BCOO.fromdense(x @ w, nse=16).todense(),
  "tree.mixed": lambda w, x: {"y": x @ w, "none": None, "flag": x > 0, "n": jnp.arange(3)},
  "tree.weak": lambda w, x: (x @ w) * 2 + jnp.asarray(3.0),
}

FORWARD_ONLY = {
  "flow.while_stray",
  "flow.fori_dynamic",
  "custom.minimize",
  "host.io_callback",
  "host.io_callback_ordered",
  "kernel.elementwise",
  "kernel.matmul",
  "kernel.in_scan",
  "custom.vmap_unbatched",
}
