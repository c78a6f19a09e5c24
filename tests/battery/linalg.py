"""All of `jax.numpy.linalg` and `jax.numpy.fft`, and most of `jax.scipy.linalg`."""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from battery.operands import positive, square

CASES = {
  "linalg.cholesky": lambda w, x: jnp.linalg.cholesky(positive(w)),
  "linalg.cond": lambda w, x: jnp.linalg.cond(square(w)),
  "linalg.cross": lambda w, x: jnp.linalg.cross((x @ w)[:, :3], x[:, 2:5]),
  "linalg.det": lambda w, x: jnp.linalg.det(square(w) / 9),
  "linalg.diagonal": lambda w, x: jnp.linalg.diagonal(w @ w),
  "linalg.eig": lambda w, x: jnp.sort(jnp.abs(jnp.linalg.eig(positive(w))[0])),
  "linalg.eigh": lambda w, x: jnp.linalg.eigh(positive(w))[0],
  "linalg.eigvals": lambda w, x: jnp.sort(jnp.abs(jnp.linalg.eigvals(positive(w)))),
  "linalg.eigvalsh": lambda w, x: jnp.linalg.eigvalsh(positive(w)),
  "linalg.inv": lambda w, x: jnp.linalg.inv(square(w)),
  "linalg.lstsq": lambda w, x: jnp.linalg.lstsq(square(w), (x @ w).T)[0],
  "linalg.matmul": lambda w, x: jnp.linalg.matmul(x, w),
  "linalg.matrix_norm": lambda w, x: jnp.linalg.matrix_norm(w @ w),
  "linalg.matrix_power": lambda w, x: jnp.linalg.matrix_power(0.1 * w, 3),
  "linalg.matrix_power_negative": lambda w, x: jnp.linalg.matrix_power(square(w), -2),
  "linalg.matrix_rank": lambda w, x: jnp.linalg.matrix_rank(square(w)),
  "linalg.matrix_transpose": lambda w, x: jnp.linalg.matrix_transpose(x @ w),
  "linalg.multi_dot": lambda w, x: jnp.linalg.multi_dot([x, w, w, x.T]),
  "linalg.norm": lambda w, x: jnp.linalg.norm(x @ w, axis=-1, keepdims=True),
  "linalg.norm_fro": lambda w, x: jnp.linalg.norm(x @ w),
  "linalg.norm_one": lambda w, x: jnp.linalg.norm(x @ w, ord=1),
  "linalg.norm_nuclear": lambda w, x: jnp.linalg.norm(square(w), ord="nuc"),
  "linalg.norm_spectral": lambda w, x: jnp.linalg.norm(square(w), ord=2),
  "linalg.outer": lambda w, x: jnp.linalg.outer((x @ w)[0], x[1]),
  "linalg.pinv": lambda w, x: jnp.linalg.pinv(square(w)),
  "linalg.qr": lambda w, x: jnp.linalg.qr(square(w))[1],
  "linalg.slogdet": lambda w, x: jnp.linalg.slogdet(square(w)),
  "linalg.solve": lambda w, x: jnp.linalg.solve(square(w), (x @ w).T),
  "linalg.svd": lambda w, x: jnp.linalg.svd(positive(w))[1],
  "linalg.svd_narrow": lambda w, x: jnp.linalg.svd(x @ w, full_matrices=False)[1],
  "linalg.svdvals": lambda w, x: jnp.linalg.svdvals(x @ w),
  "linalg.tensordot": lambda w, x: jnp.linalg.tensordot(x, w, axes=((1,), (0,))),
  "linalg.tensorinv": lambda w, x: jnp.linalg.tensorinv(square(w).reshape(8, 2, 4), ind=1),
  "linalg.tensorsolve": lambda w, x: jnp.linalg.tensorsolve(square(w), (x @ w)[0]),
  "linalg.trace": lambda w, x: jnp.linalg.trace(w @ w),
  "linalg.vecdot": lambda w, x: jnp.linalg.vecdot(x @ w, x),
  "linalg.vector_norm": lambda w, x: jnp.linalg.vector_norm(x @ w, axis=1),
  "scipy.cho_solve": lambda w, x: jsl.cho_solve(jsl.cho_factor(positive(w)), (x @ w).T),
  "scipy.lu": lambda w, x: jsl.lu(square(w))[2],
  "scipy.lu_solve": lambda w, x: jsl.lu_solve(jsl.lu_factor(square(w)), (x @ w).T),
  "scipy.solve_triangular": lambda w, x: jsl.solve_triangular(square(w), (x @ w).T),
  "scipy.solve_positive": lambda w, x: jsl.solve(positive(w), (x @ w).T, assume_a="pos"),
  "scipy.expm": lambda w, x: jsl.expm(0.1 * (w @ w)),
  "scipy.sqrtm": lambda w, x: jsl.sqrtm(positive(w)).real,
  "scipy.schur": lambda w, x: jnp.sort(jnp.diagonal(jsl.schur(positive(w))[0])),
  "scipy.hessenberg": lambda w, x: jnp.abs(jsl.hessenberg(positive(w))),
  "scipy.polar": lambda w, x: jsl.polar(square(w))[0],
  "scipy.block_diag": lambda w, x: jsl.block_diag(x @ w, w),
  "scipy.toeplitz": lambda w, x: jsl.toeplitz((x @ w)[0]),
  "scipy.eigh_tridiagonal": lambda w, x: jsl.eigh_tridiagonal(
    jnp.arange(8.0) + 0.1 * (x @ w)[0], jnp.ones(7), eigvals_only=True
  ),
  "lax.householder_product": lambda w, x: jax.lax.linalg.householder_product(
    w @ w, 0.1 * (x @ w)[0]
  ),
  "lax.tridiagonal_solve": lambda w, x: jax.lax.linalg.tridiagonal_solve(
    0.1 * (x @ w)[0], jnp.full(8, 3.0), 0.1 * (x @ w)[1], (x @ w).T
  ),
  "lax.tridiagonal": lambda w, x: jax.lax.linalg.tridiagonal(positive(w))[1],
  "fft.fft": lambda w, x: jnp.fft.fft(x @ w),
  "fft.fft2": lambda w, x: jnp.fft.fft2(x @ w),
  "fft.fftfreq": lambda w, x: (x @ w) * jnp.fft.fftfreq(8)[None],
  "fft.fftn": lambda w, x: jnp.fft.fftn(x @ w),
  "fft.fftshift": lambda w, x: jnp.fft.fftshift(x @ w),
  "fft.hfft": lambda w, x: jnp.fft.hfft(x @ w),
  "fft.ifft": lambda w, x: jnp.fft.ifft(x @ w),
  "fft.ifft2": lambda w, x: jnp.fft.ifft2(x @ w),
  "fft.ifftn": lambda w, x: jnp.fft.ifftn(x @ w),
  "fft.ifftshift": lambda w, x: jnp.fft.ifftshift(x @ w),
  "fft.ihfft": lambda w, x: jnp.fft.ihfft(x @ w),
  "fft.irfft": lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x @ w) * jnp.fft.rfft(x)),
  "fft.irfft2": lambda w, x: jnp.fft.irfft2(jnp.fft.rfft2(x @ w)),
  "fft.irfftn": lambda w, x: jnp.fft.irfftn(jnp.fft.rfftn(x @ w)),
  "fft.rfft": lambda w, x: jnp.fft.rfft(x @ w),
  "fft.rfft2": lambda w, x: jnp.fft.rfft2(x @ w),
  "fft.rfftfreq": lambda w, x: (x @ w)[:, :5] * jnp.fft.rfftfreq(8)[None],
  "fft.rfftn": lambda w, x: jnp.fft.rfftn(x @ w),
}

# Plain JAX has no derivative of these.
FORWARD_ONLY = {
  "linalg.eig",
  "linalg.matrix_rank",
  "scipy.schur",
  "scipy.hessenberg",
  "scipy.sqrtm",
  "scipy.polar",
  "scipy.eigh_tridiagonal",
  "lax.tridiagonal",
  "lax.householder_product",
}
