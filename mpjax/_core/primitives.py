"""What each primitive does with float32 under a 16-bit policy.

One table has a row of facts for every JAX primitive: its `Rule`, with the reason, and its traits.
The rules follow the lists that torch and TensorFlow agree on, and where they differ the reason says
why a primitive is where it is.
"""

import difflib
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mpjax._core.arguments import shown


class Rule(enum.Enum):
  """What a primitive does with float32 operands under a 16-bit policy."""

  __hash__ = object.__hash__  # each is one object: that of Enum hashes its name, in Python

  LOWER = "operands to the compute dtype; the result is narrow"
  WIDE = "operands to the compute dtype; the result is data, its cotangent narrow"
  EXACT = "as WIDE, but read in float32 and rounded inside: all cotangents are float32"
  RANGE = "float32 where the format is float16, whose range it leaves; follows otherwise"
  FULL = "operands to float32; the result is data"
  ALWAYS = "as FULL, whatever a rule for operations says: it has no 16-bit kernel"
  FOLLOW = "the join of the operands"
  MULTIPLY = (
    "as FOLLOW: a matmul that contracts nothing, or weighs a few terms, multiplies and adds"
  )
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
  REMAT_OPT = "a custom_vjp's forward pass, or its body where nothing of it is stored"
  LINEAR_CALL = "a linear body with the user's own transpose"
  CUSTOM_PARTITIONING = "a body that the user's own function runs on each device"
  MARKER = "hands the compute dtype to the marked function"
  LOSS_SCALE = "as ALWAYS: the border of a region with a loss scale of its own, which governs there"
  TRACED = "exactly as traced, in float32"
  FOREIGN = "as TRACED, and it may multiply: reports count its matmuls as float32"


class Trait(enum.Flag):
  """What else is known of a primitive; whoever needs a set of primitives asks `having` for it."""

  NONE = 0
  MATMUL = enum.auto()
  """A matmul or convolution."""
  ARITHMETIC = enum.auto()
  """Elementwise, and compilers compute it again by themselves rather than store it."""
  TRANSCENDENTAL = enum.auto()
  """Elementwise, and they store it."""
  SATURATES = enum.auto()
  """Becomes a constant for arguments that are far from zero."""
  ONE_AT_ZERO = enum.auto()
  """Is one for zero, and near one for arguments near it."""
  LINEAR_AT_ZERO = enum.auto()
  """Is about as large as its argument where that is small."""
  LOGARITHM = enum.auto()
  """Infinite for an argument that a 16-bit sigmoid reaches."""
  STEEP = enum.auto()
  """Has an infinite slope at zero, which a sigmoid is in float16 from an argument of -17 on."""
  MULTIPLIES_UP = enum.auto()
  """Multiplies many numbers with each other."""
  FACTORS = enum.auto()
  """Factors a matrix or solves a system: multiplies an error by the condition of that."""
  ORDERS = enum.auto()
  """Tells which of its numbers are the largest, or in which order they are."""
  JUMPS = enum.auto()
  """Is another whole number, or begins anew, where its argument is little more."""
  MOVES = enum.auto()
  """Each number of its one operand goes to one place of its result."""
  SPREADS = enum.auto()
  """Its result holds the numbers of its one operand: spread, cast, or laid out for devices."""
  KEEPS_NUMBERS = enum.auto()
  """Moves, chooses or compares numbers, and makes no new ones."""
  JIT = enum.auto()
  """Calls a jitted function."""
  REMAT = enum.auto()
  """Calls a function whose values the backward pass computes again."""
  MARKED = enum.auto()
  """Calls a function that a compiler knows by name, or runs elsewhere."""
  INLINE = enum.auto()
  """Calls a function that may as well stand in its place."""
  TRAVELS = enum.auto()
  """Its one operand goes from device to device, on its way forward or its cotangent's back."""


class Facts(NamedTuple):
  """What is known of a primitive.

  Attributes:
    rule: What it does with float32 under a 16-bit policy.
    reason: Why.
    traits: What else it is.
  """

  rule: Rule
  reason: str
  traits: Trait = Trait.NONE


_T = Trait
_EXPONENTIAL = (
  "float32: 16 bits round a decay such as exp(-0.001) to 1, and exp(11.1) exceeds float16"
)
_RANGE = "256 squared and its kind exceed float16; bfloat16 has the range of float32"
_NEAR = "errors grow near 1 and near 0"
_STEEP = "steep near one"
_SUM = "16-bit sums stall: 256 + 1 is 256 in bfloat16"
_COTANGENTS = "adds up many terms, as the cotangents of a weight that is used often"
_LARGEST = "the largest logit seeds softmax and logsumexp: x - max(x) must not round"
_NO_KERNEL = "has no 16-bit kernel, and no use for one"
_HANDS_ON = "hands each operand on by itself"
_BITS = "what the bits or the neighbors of a float32 are is a question about float32"
_AS_EXACT = "as exact as its operands"
_MOVED = "makes no new numbers"
_DEVICES = "moves numbers between devices"
_FUNCTION = "holds a Python function that was traced in float32, or references"
_NO_FLOATS = "has nothing to do with floats"

_ROWS: tuple[tuple[str, Facts], ...] = (
  (
    "dot_general conv_general_dilated ragged_dot ragged_dot_general",
    Facts(Rule.LOWER, "fast in 16 bits, and adds up in float32", _T.MATMUL),
  ),
  ("exp exp2", Facts(Rule.FULL, _EXPONENTIAL, _T.TRANSCENDENTAL | _T.ONE_AT_ZERO)),
  ("expm1", Facts(Rule.FULL, _EXPONENTIAL, _T.TRANSCENDENTAL | _T.LINEAR_AT_ZERO)),
  ("pow", Facts(Rule.FULL, _EXPONENTIAL, _T.TRANSCENDENTAL)),
  ("one_minus_square", Facts(Rule.FULL, "what is near 1 is subtracted from 1")),
  ("integer_pow", Facts(Rule.RANGE, _RANGE, _T.ARITHMETIC)),
  ("polynomial", Facts(Rule.FULL, _SUM)),
  ("atan2", Facts(Rule.RANGE, "its derivative divides by a sum of squares, which leaves float16")),
  ("cosh", Facts(Rule.RANGE, _RANGE, _T.TRANSCENDENTAL | _T.ONE_AT_ZERO)),
  ("sinh tan", Facts(Rule.RANGE, _RANGE, _T.TRANSCENDENTAL | _T.LINEAR_AT_ZERO)),
  ("square", Facts(Rule.FULL, "nearly always feeds a sum: a variance, a norm", _T.ARITHMETIC)),
  ("log log2", Facts(Rule.FULL, _NEAR, _T.TRANSCENDENTAL | _T.LOGARITHM)),
  (
    "log1p atanh erf_inv",
    Facts(Rule.FULL, _NEAR, _T.TRANSCENDENTAL | _T.LOGARITHM | _T.LINEAR_AT_ZERO),
  ),
  ("acos", Facts(Rule.FULL, _STEEP, _T.TRANSCENDENTAL | _T.STEEP)),
  ("asin", Facts(Rule.FULL, _STEEP, _T.TRANSCENDENTAL | _T.STEEP | _T.LINEAR_AT_ZERO)),
  ("rsqrt", Facts(Rule.FULL, _NEAR, _T.TRANSCENDENTAL | _T.STEEP)),
  ("acosh lgamma digamma", Facts(Rule.FULL, _NEAR, _T.TRANSCENDENTAL)),
  ("asinh", Facts(Rule.FULL, _NEAR, _T.TRANSCENDENTAL | _T.LINEAR_AT_ZERO)),
  (
    "polygamma zeta igamma igammac igamma_grad_a regularized_incomplete_beta bessel_i0e "
    "bessel_i1e random_gamma",
    Facts(Rule.FULL, _NEAR),
  ),
  (
    "reduce_sum cumsum cumlogsumexp reduce_window_sum psum psum_invariant reduce_scatter",
    Facts(Rule.FULL, _SUM),
  ),
  ("reduce_prod cumprod", Facts(Rule.FULL, "errors multiply up", _T.MULTIPLIES_UP)),
  (
    "add_any scatter-add scatter-sub scatter-mul select_and_scatter_add select_and_gather_add",
    Facts(Rule.FULL, _COTANGENTS),
  ),
  ("reduce_max reduce_min scatter-max scatter-min", Facts(Rule.FULL, _LARGEST)),
  (
    "cholesky eig eigh hessenberg lu qr schur svd tridiagonal geqp3 geqrf",
    Facts(Rule.ALWAYS, _NO_KERNEL, _T.FACTORS),
  ),
  (
    "fft householder_product complex ormqr symmetric_product",
    Facts(Rule.ALWAYS, _NO_KERNEL),
  ),
  ("triangular_solve tridiagonal_solve", Facts(Rule.ALWAYS, _NO_KERNEL, _T.FACTORS)),
  ("custom_linear_solve", Facts(Rule.TRACED, _FUNCTION, _T.FACTORS)),
  ("bitcast_convert_type nextafter", Facts(Rule.ALWAYS, _BITS)),
  ("add sub mul div neg abs sign max min", Facts(Rule.FOLLOW, _AS_EXACT, _T.ARITHMETIC)),
  ("rem floor ceil round", Facts(Rule.FOLLOW, _AS_EXACT, _T.JUMPS)),
  ("reduce_precision", Facts(Rule.FOLLOW, _AS_EXACT)),
  ("sin", Facts(Rule.FOLLOW, _AS_EXACT, _T.TRANSCENDENTAL | _T.LINEAR_AT_ZERO)),
  ("sqrt cbrt", Facts(Rule.FOLLOW, _AS_EXACT, _T.TRANSCENDENTAL | _T.STEEP)),
  ("cos", Facts(Rule.FOLLOW, _AS_EXACT, _T.TRANSCENDENTAL | _T.ONE_AT_ZERO)),
  ("logistic erfc", Facts(Rule.FOLLOW, _AS_EXACT, _T.TRANSCENDENTAL | _T.SATURATES)),
  (
    "tanh erf atan",
    Facts(Rule.FOLLOW, _AS_EXACT, _T.TRANSCENDENTAL | _T.SATURATES | _T.LINEAR_AT_ZERO),
  ),
  (
    "eq ne lt le gt ge is_finite clamp select_n stop_gradient",
    Facts(Rule.FOLLOW, _MOVED, _T.ARITHMETIC | _T.KEEPS_NUMBERS),
  ),
  (
    "broadcast_in_dim",
    Facts(Rule.FOLLOW, _MOVED, _T.ARITHMETIC | _T.SPREADS | _T.KEEPS_NUMBERS),
  ),
  ("copy", Facts(Rule.FOLLOW, _MOVED, _T.ARITHMETIC | _T.MOVES | _T.KEEPS_NUMBERS)),
  (
    "reshape transpose squeeze expand_dims rev copy_p name xla_metadata_value",
    Facts(Rule.FOLLOW, _MOVED, _T.MOVES | _T.KEEPS_NUMBERS),
  ),
  (
    "slice dynamic_slice dynamic_update_slice concatenate split pad gather scatter tie_in tile "
    "stack unstack cummax cummin reduce_window_max reduce_window_min",
    Facts(Rule.FOLLOW, _MOVED, _T.KEEPS_NUMBERS),
  ),
  ("argmax argmin top_k", Facts(Rule.FOLLOW, _MOVED, _T.KEEPS_NUMBERS | _T.ORDERS)),
  ("approx_top_k", Facts(Rule.FOLLOW, _MOVED, _T.ORDERS)),
  ("eq_to lt_to le_to dimension_as_value", Facts(Rule.FOLLOW, _MOVED)),
  (
    "sharding_constraint mesh_cast reshard layout_constraint device_put pbroadcast",
    Facts(Rule.FOLLOW, _DEVICES, _T.SPREADS | _T.KEEPS_NUMBERS),
  ),
  ("pvary pcast", Facts(Rule.FOLLOW, _DEVICES, _T.SPREADS | _T.KEEPS_NUMBERS | _T.TRAVELS)),
  (
    "all_gather all_gather_invariant all_to_all ppermute",
    Facts(Rule.FOLLOW, _DEVICES, _T.KEEPS_NUMBERS | _T.TRAVELS),
  ),
  ("pmax pmin", Facts(Rule.FOLLOW, _DEVICES, _T.KEEPS_NUMBERS)),
  ("ragged_all_to_all copy_to_host_async", Facts(Rule.FOLLOW, _DEVICES)),
  ("sort", Facts(Rule.EACH, _HANDS_ON, _T.ORDERS)),
  ("optimization_barrier mpjax_fixed", Facts(Rule.EACH, _HANDS_ON)),
  (
    "convert_element_type",
    Facts(Rule.CONVERT, "a change of dtype", _T.ARITHMETIC | _T.SPREADS | _T.KEEPS_NUMBERS),
  ),
  ("jit pjit", Facts(Rule.CALL, "a function", _T.JIT)),
  ("remat remat2 checkpoint", Facts(Rule.CALL, "a function", _T.REMAT)),
  ("closed_call core_call call eval_jaxpr", Facts(Rule.CALL, "a function", _T.INLINE)),
  ("shard_map", Facts(Rule.CALL, "a function of one device's parts")),
  (
    "composite compute_on xla_metadata_call",
    Facts(Rule.CALL, "a function", _T.MARKED),
  ),
  ("scan", Facts(Rule.SCAN, "a loop")),
  ("while", Facts(Rule.WHILE, "a loop that does not say how often it runs")),
  ("cond", Facts(Rule.COND, "a choice of functions")),
  ("custom_jvp_call", Facts(Rule.CUSTOM_JVP, "a function with a rule of its own", _T.INLINE)),
  ("custom_vjp_call", Facts(Rule.CUSTOM_VJP, "a function with a rule of its own")),
  ("custom_lin", Facts(Rule.CUSTOM_LIN, "the tangents of such a function")),
  ("custom_vmap_call", Facts(Rule.CUSTOM_VMAP, "a function with a rule of its own")),
  ("remat_opt", Facts(Rule.REMAT_OPT, "the forward pass of such a function")),
  ("linear_call", Facts(Rule.LINEAR_CALL, "a linear function with a transpose of its own")),
  ("custom_partitioning", Facts(Rule.CUSTOM_PARTITIONING, "a function with parts of its own")),
  (
    "mpjax_cast_inputs mpjax_cast_inputs_tangent",
    Facts(Rule.MARKER, "a function that asked for the compute dtype"),
  ),
  ("mpjax_loss_scale", Facts(Rule.LOSS_SCALE, "multiplies cotangents, in float32")),
  (
    "pallas_call tpu_custom_call core_map ffi_call call_exported call_tf rnn rnn_bwd stage "
    "pure_callback io_callback call_hi_primitive call_hi_primitive_linearized run_state scaled_dot "
    "scaled_matmul scaled_matmul_wrapper dot_product_attention_fwd_wrapper "
    "dot_product_attention_bwd_wrapper "
    "dot_product_attention_fp8_fwd_wrapper dot_product_attention_fp8_bwd_wrapper spsolve",
    Facts(Rule.FOREIGN, "a kernel or compiled code, to which `cast_inputs` hands 16 bits"),
  ),
  (
    "bcoo_dot_general bcoo_dot_general_sampled bcoo_spdot_general bcsr_dot_general coo_matvec "
    "coo_matmat csr_matvec csr_matmat",
    Facts(Rule.FOREIGN, "sums up rows by a scatter in its result's dtype: 16-bit sums stall"),
  ),
  (
    "bcoo_todense bcoo_fromdense bcoo_extract bcoo_transpose bcoo_sort_indices "
    "bcoo_sum_duplicates bcsr_todense bcsr_fromdense bcsr_extract coo_todense coo_fromdense "
    "csr_todense csr_fromdense todense",
    Facts(Rule.TRACED, "a sparse array, in which duplicates sum up"),
  ),
  (
    "all_gather_reduced preduced pbroadcast_dynamic precv psend reduced_vary_cast "
    "reduced_vary_cast_p vary_unreduced_cast vary_unreduced_cast_p unreduced_psum unreduced_pmax "
    "unreduced_pmin unreduced_reduce_scatter relayout with_memory_space_constraint "
    "global_array_to_host_local_array host_local_array_to_global_array",
    Facts(Rule.TRACED, "how an array lies on devices, where its type says it"),
  ),
  (
    "new_ref empty_ref free_ref freeze accum_grad_in_ref new_variable get_variable set_variable "
    "new_box box_get box_set new_log log_read log_extend check inspect_sharding dce_sink tie",
    Facts(Rule.TRACED, _FUNCTION),
  ),
  (
    "mulhi threefry4x32 philox2x32 philox4x32 lu_pivots_to_permutation from_edtype to_edtype",
    Facts(Rule.TRACED, _NO_FLOATS),
  ),
  (
    "reduce reduce_window select_and_scatter get swap addupdate debug_callback debug_print",
    Facts(Rule.TRACED, _FUNCTION),
  ),
  (
    "empty empty2 after_all create_token axis_index iota rng_uniform rng_bit_generator random_bits "
    "random_fold_in random_seed random_split random_wrap random_unwrap random_clone threefry2x32 "
    "real imag conj xor clz population_count shift_left shift_right_arithmetic "
    "shift_right_logical reduce_and reduce_or reduce_xor",
    Facts(Rule.TRACED, _NO_FLOATS),
  ),
  ("and or not", Facts(Rule.TRACED, _NO_FLOATS, _T.ARITHMETIC)),
  (
    "mpjax_attached mpjax_constant mpjax_float8_tangent mpjax_rounded mpjax_wide_tangent",
    Facts(Rule.TRACED, "a derivative that a policy made, float32 by intent"),
  ),
)

FACTS: Mapping[str, Facts] = MappingProxyType(
  {name: facts for names, facts in _ROWS for name in names.split()}
)
"""What is known of each primitive of JAX, by name; it stands nowhere else."""

RULES: Mapping[str, Rule] = MappingProxyType({name: facts.rule for name, facts in FACTS.items()})
"""What each primitive does with float32 under a 16-bit policy, unless a policy map says else."""


def having(traits: Trait) -> frozenset[str]:
  """The names of the primitives that have any of some traits.

  Example:
    >>> sorted(having(Trait.SATURATES))
    ['atan', 'erf', 'erfc', 'logistic', 'tanh']
  """
  return frozenset(name for name, facts in FACTS.items() if facts.traits & traits)


MATMULS = having(Trait.MATMUL)
"""Matmuls and convolutions."""
UNCHANGED = having(Trait.MOVES | Trait.SPREADS)
"""What hands on the numbers of its one operand: moved, spread, cast, or laid out for devices."""
KEEPS_NUMBERS = having(Trait.KEEPS_NUMBERS)
"""What moves, chooses or compares numbers, and makes no new ones."""
ADDS = frozenset({"add", "sub"})
"""What adds two values."""
BOUNDS = frozenset({"max", "min", "clamp"})
"""What bounds a value by others."""
CUTS = frozenset({"slice", "dynamic_slice", "split"})
"""What cuts pieces from a value."""
COMPARES = frozenset({"gt", "ge", "lt", "le"})
"""What tells which of two is larger."""
SCALES = frozenset({"mul", "div"})
"""What multiplies or divides two."""
JITTED = having(Trait.JIT)
"""Calls of jitted functions."""
FUNCTIONS = having(Trait.JIT | Trait.INLINE)
"""These, and calls of functions with a derivative rule of their user's."""
REMATS = having(Trait.REMAT)
"""Calls of functions that the backward pass computes again: it stores their operands."""
CALLS = having(Trait.JIT | Trait.REMAT)
"""Calls of jitted functions, and of functions that the backward pass computes again."""

_CLASSES = {rule.name.lower(): rule for rule in (Rule.LOWER, Rule.RANGE, Rule.FULL, Rule.FOLLOW)}

DEFAULT_OPS: Mapping[str, str] = MappingProxyType(
  {name: rule.name.lower() for name, rule in RULES.items() if rule.name.lower() in _CLASSES}
)
"""What a 16-bit policy does with each primitive, by name.

``lower``: runs in the compute dtype (matmuls, convolutions), but for the power iteration of Flax's
spectral norms, which is float32 in modules under `apply_policy`, and for matmuls that count whole
numbers or are inner products, which add up all that they multiply. ``full``: runs in float32
(logarithms, sums, statistics). ``range``: runs in float32 if the compute dtype is float16, whose
range it leaves (integer powers). ``follow``: runs in whatever its operands have. Changes go
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
