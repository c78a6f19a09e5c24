"""Well-conditioned matrices from a parameter, by a matmul that runs narrow."""

import jax
import jax.numpy as jnp


def square(w: jax.Array) -> jax.Array:
  """A matrix with a condition number below two."""
  return 0.25 * (w @ w) + jnp.diag(9.0 + jnp.arange(8.0) / 4)


def positive(w: jax.Array) -> jax.Array:
  """A symmetric matrix with distinct positive eigenvalues."""
  return 0.25 * (w @ w.T) + jnp.diag(9.0 + jnp.arange(8.0))


def hidden(w: jax.Array, x: jax.Array) -> jax.Array:
  """What came out of a matmul, in (0.25, 0.75): inside the domain of nearly every function."""
  return 0.5 + 0.25 * jnp.tanh(x @ w)
