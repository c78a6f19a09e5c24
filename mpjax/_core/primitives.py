"""What each primitive does with float32 under a 16-bit policy.

The table `RULES` maps the name of every JAX primitive to one of a few classes, `Rule`. It follows
the lists that torch and TensorFlow agree on; where they differ an entry says why it is where it is.
"""

import difflib
import enum
from collections.abc import Mapping
from types import MappingProxyType

from mpjax._core.arguments import shown


class Rule(enum.Enum):
  """What a primitive does with float32 operands under a 16-bit policy."""

  LOWER = "operands to the compute dtype; the result is narrow"
  SCORES = "operands to the compute dtype; the result is data, its cotangent narrow"
  RANGE = "float32 where the format is float16, whose range it leaves; follows otherwise"
  FULL = "operands to float32; the result is data"
  ALWAYS = "as FULL, whatever a rule for operations says: it has no 16-bit kernel"
  FOLLOW = "the join of the operands"
  NAMED = "as the rule of the policy map says that names the operation"
  EACH = "every result is held as the operand in its place"
  CONVERT = "a change of dtype"
  CALL = "one body with the operands of the equation"
  SCAN = "a body whose carry is a fixed point"
  WHILE = "a body and a condition whose carry is a fixed point"
  COND = "branches whose results are joined"
  CUSTOM_JVP = "a body with the user's own derivative"
  CUSTOM_VJP = "a body with the user's own forward and backward pass"
  CUSTOM_LIN = "what is left of a custom_vjp where only its tangents are wanted: its transpose"
  CUSTOM_VMAP = "a body with the user's own batching"
  MARKER = "hands the compute dtype to the marked function"
  TRACED = "exactly as traced, in float32"


def _words(text: str) -> list[str]:
  return text.split()


def _table(groups: dict[Rule, str]) -> dict[str, Rule]:
  return {name: rule for rule, names in groups.items() for name in _words(names)}


RULES = _table(
  {
    Rule.LOWER: "dot_general conv_general_dilated ragged_dot ragged_dot_general",
    # exp(11.1), tan, 256 squared and their kind exceed float16; bfloat16 has float32's range.
    Rule.RANGE: "exp exp2 expm1 pow integer_pow polynomial cosh sinh tan one_minus_square",
    Rule.FULL: " ".join(
      [
        # Squares nearly always feed a sum: a variance, a norm.
        "square",
        # Errors grow near 1 and near 0.
        "log log1p log2 rsqrt erf_inv atanh acosh asinh lgamma digamma polygamma zeta igamma",
        "igammac igamma_grad_a regularized_incomplete_beta bessel_i0e bessel_i1e random_gamma",
        # 16-bit sums stall: 256 + 1 is 256 in bfloat16. lax.reduce_sum does not widen by itself.
        "reduce_sum reduce_prod cumsum cumprod cumlogsumexp reduce_window_sum psum",
        # add_any sums the cotangents of a value used many times: of a shared weight, say.
        "add_any psum_invariant reduce_scatter scatter-add scatter-mul scatter-max scatter-min",
        "select_and_scatter_add select_and_gather_add",
        # The largest logit seeds softmax and logsumexp: x - max(x) must not round.
        "reduce_max reduce_min",
      ]
    ),
    Rule.ALWAYS: " ".join(
      [
        # No 16-bit kernels, and no use for them.
        "cholesky eig eigh fft hessenberg householder_product lu qr schur svd triangular_solve",
        "tridiagonal tridiagonal_solve complex",
        # What the bits or the neighbors of a float32 are is a question about float32.
        "bitcast_convert_type nextafter",
      ]
    ),
    Rule.FOLLOW: " ".join(
      [
        "add sub mul div rem max min neg abs sign floor ceil round",
        "sqrt cbrt erf erfc tanh logistic sin cos asin acos atan atan2 clamp select_n",
        "eq ne lt le gt ge eq_to lt_to le_to is_finite argmax argmin stop_gradient",
        "broadcast_in_dim reshape transpose squeeze expand_dims rev slice dynamic_slice",
        "dynamic_update_slice concatenate split pad gather scatter copy copy_p tie_in name",
        "reduce_window_max reduce_window_min cummax cummin reduce_precision top_k approx_top_k",
        "sharding_constraint mesh_cast reshard layout_constraint tile stack unstack",
        "all_gather all_gather_invariant all_to_all ppermute pmax pmin pbroadcast pvary pcast",
        "ragged_all_to_all device_put dimension_as_value copy_to_host_async",
      ]
    ),
    Rule.EACH: "sort optimization_barrier mpjax_fixed",
    Rule.CONVERT: "convert_element_type",
    Rule.CALL: "jit pjit closed_call core_call call eval_jaxpr remat remat2 checkpoint shard_map",
    Rule.SCAN: "scan",
    Rule.WHILE: "while",
    Rule.COND: "cond",
    Rule.CUSTOM_JVP: "custom_jvp_call",
    Rule.CUSTOM_VJP: "custom_vjp_call",
    Rule.CUSTOM_LIN: "custom_lin",
    Rule.CUSTOM_VMAP: "custom_vmap_call",
    Rule.MARKER: "mpjax_cast_inputs mpjax_cast_inputs_tangent",
    # Decided, not forgotten: these hold Python functions, references or no floats at all.
    Rule.TRACED: " ".join(
      [
        "reduce reduce_window select_and_scatter custom_linear_solve get swap addupdate",
        "empty empty2 after_all create_token axis_index iota rng_uniform rng_bit_generator",
        "random_bits random_fold_in random_seed random_split random_wrap random_unwrap",
        "random_clone threefry2x32 real imag conj and or not xor clz population_count",
        "shift_left shift_right_arithmetic shift_right_logical reduce_and reduce_or reduce_xor",
        "debug_callback debug_print",
        # A matmul whose tangent is float32 by intent, in a derivative that autocast made.
        "mpjax_wide_tangent",
      ]
    ),
  }
)


ARITHMETIC = frozenset(
  _words(
    "add sub neg mul div max min abs sign square integer_pow clamp select_n broadcast_in_dim "
    "convert_element_type stop_gradient copy eq ne lt le gt ge is_finite and or not"
  )
)
"""Elementwise primitives that compilers compute again by themselves rather than store."""

TRANSCENDENTAL = frozenset(
  _words(
    "sqrt rsqrt cbrt exp exp2 expm1 pow log log1p log2 tanh logistic erf erfc erf_inv sin cos tan "
    "sinh cosh asin acos atan asinh acosh atanh lgamma digamma"
  )
)
"""Elementwise primitives that they store."""

_CLASSES = {rule.name.lower(): rule for rule in (Rule.LOWER, Rule.RANGE, Rule.FULL, Rule.FOLLOW)}

DEFAULT_OPS: Mapping[str, str] = MappingProxyType(
  {name: rule.name.lower() for name, rule in RULES.items() if rule.name.lower() in _CLASSES}
)
"""What a 16-bit policy does with each primitive, by name.

``lower``: runs in the compute dtype (matmuls, convolutions), but for the power iteration of Flax's
spectral norms, which is float32 in modules under `apply_policy`. ``full``: runs in float32
(logarithms, sums, statistics). ``range``: runs in float32 if the compute dtype is float16, whose
range it leaves (exponentials, powers). ``follow``: runs in whatever its operands have. Changes go
into ``PolicyMap(..., ops={"exp": "follow"})``.
"""


def read_ops(changes: Mapping[str, str]) -> Mapping[str, Rule]:
  """The table of primitives with some classes changed.

  Raises:
    ValueError: A name is not in `DEFAULT_OPS`, or a class is none of its four.
  """
  for name, rule in changes.items():
    if name not in DEFAULT_OPS:
      close = difflib.get_close_matches(str(name), DEFAULT_OPS, n=3)
      raise ValueError(
        f"ops must name primitives of mpjax.DEFAULT_OPS; got {shown(name)}. "
        + (f"Closest: {', '.join(close)}." if close else "Print it for the names.")
      )
    if rule not in _CLASSES:
      raise ValueError(
        f"ops must map a primitive to one of {', '.join(_CLASSES)}; got {shown(rule)} for "
        f"{name!r}. mpjax.DEFAULT_OPS says what each has by default."
      )
  return {**RULES, **{name: _CLASSES[rule] for name, rule in changes.items()}} if changes else RULES
