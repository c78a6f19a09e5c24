"""Programs twice as long take about twice as long to plan, in calls of functions."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from _arrays import array

W = array(np.full((4, 4), 1 / 8))
TWICE = 2.4  # what grows with the square makes four of two


def averaged(w, rows):
  """A mean that follows, its decay computed."""
  decay = jnp.tanh(w[0, 0])
  mean = jnp.abs(rows[0] @ w)
  for row in rows[1:]:
    mean = decay * mean + (1 - decay) * jnp.abs(row @ w)
  return mean


def stack(w, rows):
  """Residual layers."""
  h = rows[0] @ w
  for row in rows:
    h = h + jnp.tanh(h * row) @ w
  return h


def cells(w, rows):
  """A gated recurrent network, written out."""
  c = h = jnp.zeros(4)
  for row in rows:
    f, i, o, g = (jax.nn.sigmoid(row @ (n * w) + h @ w) for n in (1, 2, 3, 4))
    c = f * c + i * jnp.tanh(g)
    h = o * jnp.tanh(c)
  return h


def mixed(w, rows):
  """Gates that mix what they were given."""
  h = jnp.ones(4)
  for row in rows:
    z = jax.nn.sigmoid(row @ w)
    h = (1 - z) * h + z * jnp.tanh(row @ w)
  return h


def trained(w, rows):
  """Gradient steps."""
  for row in rows:
    w = w - 0.1 * jax.grad(lambda w, x=row: jnp.sum((x @ w) ** 2))(w)
  return w


def attended(w, rows):
  """Softmaxes, each of what the last one gave."""
  h = jnp.stack(rows[:4])
  for _ in rows:
    h = jax.nn.softmax(h @ w @ h.T / 2) @ h
  return h


def read_by_all(w, rows):
  """A value that all read."""
  u = rows[0] @ w
  return sum(jnp.tanh(u * row).sum() for row in rows)


def scaled(w, rows):
  """Multiples of multiples, which a matmul reads at last."""
  y = rows[0] @ w
  for _ in rows:
    y = -0.99 * y
  return y @ w


def powers(w, rows):
  """A product that is multiplied on."""
  y = u = jax.nn.sigmoid(rows[0] @ w)
  for _ in rows:
    y = y * u
  return jnp.log(1 - y)


def normalized(w, rows):
  """Norms and activations."""
  h = rows[0] @ w
  for row in rows:
    h = jax.nn.gelu(nn.standardize(h) @ w) * row
  return h


def summed(w, rows):
  """A polynomial of products."""
  total = jnp.zeros((4, 4))
  for row in rows:
    h = jnp.outer(row, row) @ w
    total = total + h @ h.T + (total * total + total)
  return total


def orthogonalized(w, rows):
  """What is left of a value without its parts along others."""
  h = rows[0]
  for row in rows:
    h = h - row @ jnp.tanh(jnp.outer(row, row)) - (row * h).sum() * h
  return h @ w


def gradient(fn):
  return jax.grad(lambda w, rows: jnp.sum(fn(w, rows)))


def calls(fn, n):
  """How many functions are called where a program of n rounds is traced under a policy."""
  rows = jnp.ones((n, 4))
  run = mpjax.autocast(lambda w, rows: fn(w, list(rows)), "mixed_bfloat16")
  count = 0

  def profile(frame, event, arg):
    nonlocal count
    del frame, arg
    count += event in ("call", "c_call")

  before = sys.getprofile()
  sys.setprofile(profile)
  try:
    jax.make_jaxpr(run)(W, rows)
  finally:
    sys.setprofile(before)
  return count


PROGRAMS = (
  averaged,
  stack,
  cells,
  mixed,
  trained,
  attended,
  read_by_all,
  powers,
  normalized,
  summed,
  orthogonalized,
)


programs = pytest.mark.parametrize("fn", PROGRAMS, ids=lambda fn: fn.__name__)


@pytest.mark.quick(every=2)
@programs
def test_a_program_twice_as_long_is_planned_in_twice_the_calls(fn):
  calls(fn, 4)  # what is imported or made once
  assert calls(fn, 96) < TWICE * calls(fn, 48)


def test_so_are_many_multiples():
  calls(scaled, 4)
  assert calls(scaled, 800) < TWICE * calls(scaled, 400)


@pytest.mark.quick(every=3)
@programs
def test_so_is_one_with_a_backward_pass(fn):
  calls(gradient(fn), 4)
  assert calls(gradient(fn), 32) < TWICE * calls(gradient(fn), 16)
