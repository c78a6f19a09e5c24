"""All of `jax.scipy.special`, and log-densities of `jax.scipy.stats`."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.special as jss
from jax.scipy import stats

from battery.operands import hidden

# Functions of one number between zero and one.
UNARY = (
  "dawsn digamma entr erf erfc erfcinv erfcx erfinv exp1 expi expit fresnel gamma gammaln gammasgn "
  "i0 i0e i1 i1e log_ndtr log_softmax loggamma logit logsumexp ndtr ndtri sici softmax spence wofz "
  "factorial"
)
# Functions of two.
BINARY = (
  "beta betaln boxcox boxcox1p comb gammainc gammaincc kl_div owens_t poch rel_entr xlog1py xlogy"
)


def unary(name):
  return lambda w, x: getattr(jss, name)(hidden(w, x))


def binary(name):
  return lambda w, x: getattr(jss, name)(hidden(w, x) + 0.5, hidden(w, -x))


DENSITIES = {
  "norm": lambda h: stats.norm.logpdf(h, 0.5, 2.0),
  "norm_cdf": lambda h: stats.norm.logcdf(h),
  "beta": lambda h: stats.beta.logpdf(h, 1.5, 2.0),
  "cauchy": lambda h: stats.cauchy.logpdf(h),
  "dirichlet": lambda h: stats.dirichlet.logpdf((h / h.sum(-1, keepdims=True)).T, jnp.ones(8) * 2),
  "expon": lambda h: stats.expon.logpdf(h),
  "gamma": lambda h: stats.gamma.logpdf(h, 2.0),
  "laplace": lambda h: stats.laplace.logpdf(h),
  "logistic": lambda h: stats.logistic.logpdf(h),
  "poisson": lambda h: stats.poisson.logpmf(jnp.array([[1], [2]]), 2 * h),
  "bernoulli": lambda h: stats.bernoulli.logpmf(jnp.array([[1], [0]]), h),
  "multinomial": lambda h: stats.multinomial.logpmf(jnp.arange(8), 28, h[0] / h[0].sum()),
  "multivariate_normal": lambda h: stats.multivariate_normal.logpdf(h, jnp.zeros(8), jnp.eye(8)),
  "t": lambda h: stats.t.logpdf(h, 3.0),
  "uniform": lambda h: stats.uniform.logpdf(h),
  "kde": lambda h: stats.gaussian_kde(h[0])(h[1]),
}


def at_hidden(density, w, x):
  return density(hidden(w, x))


CASES = {
  **{f"special.{name}": unary(name) for name in UNARY.split() if hasattr(jss, name)},
  **{f"special.{name}": binary(name) for name in BINARY.split()},
  "special.bernoulli": lambda w, x: hidden(w, x)[:, :5] * jss.bernoulli(4)[None],
  "special.bessel_jn": lambda w, x: jss.bessel_jn(hidden(w, x)[0], v=2, n_iter=10),
  "special.betainc": lambda w, x: jss.betainc(1.0 + hidden(w, x), 1.0, 0.5),
  "special.expn": lambda w, x: jss.expn(jnp.array([[1], [2]]), hidden(w, x)),
  "special.hyp1f1": lambda w, x: jss.hyp1f1(1.0, 2.0, hidden(w, x)),
  "special.hyp2f1": lambda w, x: jss.hyp2f1(1.0, 2.0, 3.0, 0.5 * hidden(w, x)),
  "special.multigammaln": lambda w, x: jss.multigammaln(3 + hidden(w, x), 3),
  "special.polygamma": lambda w, x: jss.polygamma(1, 1 + hidden(w, x)),
  "special.sph_harm_y": lambda w, x: jss.sph_harm_y(
    jnp.array([1]), jnp.array([1]), hidden(w, x)[0, :1], hidden(w, x)[1, :1], n_max=2
  ),
  "special.zeta": lambda w, x: jss.zeta(2.0 + hidden(w, x), 1.0),
  "special.logsumexp_signed": lambda w, x: jss.logsumexp(x @ w, b=x, return_sign=True)[0],
  **{f"stats.{name}": functools.partial(at_hidden, density) for name, density in DENSITIES.items()},
  "lax.random_gamma_grad": lambda w, x: jax.lax.random_gamma_grad(1 + hidden(w, x), x + 2),
  "lax.igamma_grad_a": lambda w, x: jax.lax.igamma_grad_a(1 + hidden(w, x), hidden(w, x)),
}

FORWARD_ONLY = {"lax.random_gamma_grad", "lax.igamma_grad_a", "special.betainc"}
