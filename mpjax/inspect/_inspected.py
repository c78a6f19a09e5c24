"""What a report is about: a function, a Linen module or an NNX model, with its arguments."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from mpjax._core.dtypes import FLOAT32, describe, is_of
from mpjax._core.policy import Policy
from mpjax._core.policy_map import PolicyLike, PolicyMap, as_policy_map
from mpjax._core.scopes import Path
from mpjax._core.tree_paths import leaf_paths, path_str
from mpjax._engine.autocast import names_of, parameter_flags
from mpjax._engine.calls import STATE, Flags, is_traced, spread_flags
from mpjax._engine.execute import Decided, decide
from mpjax._engine.kept_plans import Planned
from mpjax._engine.planning.plan import LOCATED, Scoping
from mpjax._flax.linen_modules import modules_of
from mpjax._flax.nnx_calls import has_nodes, module_paths, pure_call
from mpjax._flax.policed import PLAIN, POLICIES

_NUMBERS = (float, complex)  # bools and integers have no gradient


class Subject(NamedTuple):
  """A pure function with its arguments, and how autocast would be told about them.

  Attributes:
    name: What a report calls it.
    fn: The function.
    args: Its positional arguments; arrays may be ``jax.ShapeDtypeStruct``.
    kwargs: Its keyword arguments.
    flags: Which of them hold parameters.
    labels: What the paths of each positional argument's leaves start with: a name, a list of
      names for the entries of a tuple, or None to leave out what they start with themselves.
    policies: The policies that it is looked at under.
    scoping: How scopes lead to the paths of modules.
    known: Module paths that there are, whether the call runs them or not.
    has_mutable: Whether it returns collections of a Linen module beside its results.
  """

  name: str
  fn: Callable[..., Any]
  args: tuple[Any, ...]
  kwargs: dict[str, Any]
  flags: Flags
  labels: Sequence[Any]
  policies: PolicyMap
  scoping: Scoping = LOCATED
  known: tuple[Path, ...] = ()
  has_mutable: bool = False

  def differentiable(self) -> Subject:
    """With the numbers among its parameters as arrays, as ``jax.grad`` takes them.

    But for the fields of objects with flags or integers beside, which it refuses: their libraries
    take the gradients of arrays alone, and their functions may branch on such numbers.
    """
    leaves, tree, places = self._parameters()
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path((self.args, self.kwargs))[0]]
    is_refused = any(
      not has_shape(leaves[n]) and not isinstance(leaves[n], _NUMBERS) for n in places
    )
    arrays = {
      n: jnp.asarray(leaves[n])
      for n in places
      if isinstance(leaves[n], _NUMBERS)
      and not (is_refused and isinstance(paths[n][-1], jax.tree_util.GetAttrKey))
    }
    args, kwargs = jax.tree.unflatten(tree, [arrays.get(n, x) for n, x in enumerate(leaves)])
    return self._replace(args=args, kwargs=kwargs) if arrays else self

  def _parameters(self) -> tuple[list[Any], Any, list[int]]:
    """The leaves of the arguments, how these are made of them, and which are of parameters."""
    leaves, tree = jax.tree.flatten((self.args, self.kwargs))
    names = sorted(self.kwargs)
    flags = [*self.flags[0], *(self.flags[1][name] for name in names)]
    spread = spread_flags(flags, [*self.args, *(self.kwargs[name] for name in names)])
    return leaves, tree, [n for n, flag in enumerate(spread) if flag is True]

  def _differentiated(self) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The floats of the parameters, and how positional and keyword arguments are made of them."""
    leaves, tree, places = self._parameters()
    places = [n for n in places if has_shape(leaves[n]) and is_of(leaves[n], np.inexact)]

    def merged(params: list[Any]) -> Any:
      own = dict(zip(places, params, strict=True))
      return jax.tree.unflatten(tree, [own.get(n, x) for n, x in enumerate(leaves)])

    return [leaves[n] for n in places], merged

  def of_arrays(self, fn: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """A function of the positional arguments as one of the arrays among them, and these."""
    leaves, tree = jax.tree.flatten(self.args)

    def run(*arrays: Any) -> Any:
      rest = iter(arrays)
      return fn(*jax.tree.unflatten(tree, [next(rest) if is_traced(x) else x for x in leaves]))

    return run, [x for x in leaves if is_traced(x)]

  def backward(self) -> Subject:
    """The gradients of its parameters; results that are no scalars are summed."""

    def gradients(*args: Any, **kwargs: Any) -> Any:
      params, merged = self._replace(args=args, kwargs=kwargs)._differentiated()
      if not params:
        raise ValueError(
          "grad=True differentiates with respect to the parameters, and no float is one. Set "
          "argnums to the arguments that hold them."
        )

      def total(params: list[Any]) -> Any:
        args, kwargs = merged(params)
        out = self.fn(*args, **kwargs)
        results = jax.tree.leaves(out[0] if self.has_mutable else self.results(out))
        sums = [x if x.ndim == 0 else x.sum() for x in results if is_real(x)]
        if not sums:
          raise ValueError(
            "grad=True differentiates the sum of the float results, and there is none. Return "
            "what the gradient is of, as a loss is."
          )
        return sums[0] if len(sums) == 1 else sum(x.astype(FLOAT32) for x in sums)

      return jax.grad(total)(params)

    return self._replace(name=f"gradient of {self.name}", fn=gradients)

  @property
  def has_models(self) -> bool:
    """Whether NNX models are among the arguments."""
    return self.scoping.absolute

  @property
  def params(self) -> list[str]:
    """The paths of the floats in the positional arguments that hold the parameters."""
    chosen = tuple(self.args[n] for n, flag in enumerate(self.flags[0]) if flag is True)
    paths = leaf_paths(chosen[0] if len(chosen) == 1 else chosen)
    return [path for path, x in paths if has_shape(x) and is_of(x, np.inexact)]

  def under(self, policies: PolicyMap) -> Callable[..., Any]:
    """The function of its positional arguments under a policy map; its results are float32."""

    def run(*args: Any) -> Any:
      if policies.is_float32():
        return self.results(self.fn(*args))
      return self.results(self._replace(args=args).decide(policies).run().cast(FLOAT32))

    return run

  def results(self, out: Any) -> Any:
    """What the user's function returned: a call with models returns their states besides."""
    return out[0] if self.has_models else out

  def value_and_grad(self, policies: PolicyMap, scale: float = 1.0) -> Callable[..., Any]:
    """The loss, and the gradients of what `params` names, through the loss times a scale."""
    run = self.under(policies)

    def both(*args: Any) -> tuple[Any, Any]:
      params, merged = self._replace(args=args)._differentiated()

      def scaled(params: list[Any]) -> tuple[Any, Any]:
        args, _ = merged(params)
        loss = run(*args)
        return (loss if scale == 1 else loss * scale), loss

      grads, loss = jax.grad(scaled, has_aux=True)(params)
      return loss, grads if scale == 1 else [g / scale for g in grads]

    return both

  def decide(self, policies: PolicyMap | None = None, *, strict: bool = True) -> Decided:
    """Trace and plan it, under its own policies or others."""
    return decide(
      self.fn,
      self.policies if policies is None else policies,
      self.args,
      self.kwargs,
      self.flags,
      scoping=self.scoping,
      strict=strict,
      known=self.known,
    )

  def plan_abstractly(self) -> Planned:
    """Trace and plan it without arrays: every array among the arguments may be a shape.

    What is planned outlives the trace, and holds nothing of it.
    """
    leaves, tree = jax.tree.flatten((self.args, self.kwargs))
    found: list[Planned] = []

    def trace(arrays: list[Any]) -> None:
      rest = iter(arrays)
      merged = [next(rest) if has_shape(x) else x for x in leaves]
      args, kwargs = jax.tree.unflatten(tree, merged)
      found.append(self._replace(args=args, kwargs=kwargs).decide().planned)

    jax.eval_shape(trace, [x for x in leaves if has_shape(x)])
    return found[0]

  def operand_names(self) -> list[str]:
    """The paths of the arrays among the arguments, in the order of the trace."""
    named: list[str] = []
    for label, value in zip(self.labels, self.args, strict=True):
      named += _names(label, value)
    for key in sorted(self.kwargs):
      named += _names(key, self.kwargs[key])
    return named


def subject_of(
  fn: Any,
  policy: PolicyLike | None,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  argnums: int | Sequence[int] = 0,
) -> Subject:
  """Reads what a tool of `mpjax.inspect` was given.

  Args:
    fn: A function of pytrees or of NNX models, a Linen module, or an NNX model.
    policy: The policy; None for the one that `apply_policy` gave the module.
    args: The arguments of the function or model; for a Linen module those of ``apply``.
    kwargs: The keyword arguments likewise.
    argnums: Which arguments of a function hold its parameters.

  Raises:
    TypeError: ``fn`` cannot be called, or an argument came for the policy.
    ValueError: There is no policy, a spec cannot be parsed, or a Linen module lacks variables.
  """
  policies = _policies_of(fn, policy)
  if isinstance(fn, nn.Module):
    return _linen_subject(fn, policies, args, kwargs)
  if isinstance(fn, nnx.Module):
    plain = getattr(type(fn), PLAIN, type(fn))
    method: Any = plain.__call__
    labels = _parameter_names(method, 1 + len(args))
    return _nnx_subject(plain.__name__, method, policies, [fn, *args], kwargs, labels, (), plain)
  if isinstance(fn, type) and issubclass(fn, nn.Module | nnx.Module):
    raise TypeError(
      f"A report is about a function, a Linen module or an NNX model. Got the class {fn.__name__}. "
      "Make an instance first."
    )
  if not callable(fn):
    raise TypeError(
      f"A report is about a function, a Linen module or an NNX model; got {type(fn).__name__}. "
      "Pass one of these first, then the policy, then its arguments."
    )
  name = getattr(fn, "__name__", type(fn).__name__)
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
  flags = parameter_flags(numbers, names_of(fn, numbers), args, kwargs)
  labels = _parameter_names(fn, len(args))
  if has_nodes((tuple(args), kwargs)):
    return _nnx_subject(name, fn, policies, args, kwargs, labels, flags[0])
  return Subject(name, fn, tuple(args), kwargs, flags, labels, policies)


def _policies_of(fn: Any, policy: PolicyLike | None) -> PolicyMap:
  own = getattr(type(fn), POLICIES, None)
  if _is_argument(policy):
    raise TypeError(
      f"A report takes a function, its policy, then its arguments. Got {describe(policy)} for the "
      + ("policy. Pass None for the model's own: explain(model, None, x)." if own else _PLAIN)
    )
  if policy is not None:
    return as_policy_map(policy)
  if own is None:
    raise ValueError(
      f"A policy must be given, or a module that apply_policy made; got None for {fn!r}. Pass for "
      "example 'mixed_bfloat16'."
    )
  return own


_PLAIN = (
  "policy. Pass the plain function (the loss of a train step, what mpjax.autocast was given), then "
  "the policy: explain(loss, 'mixed_bfloat16', params, batch)."
)


def _is_argument(policy: Any) -> bool:
  """Whether what came for a policy is none, nor a dict that is meant for the rules of a map."""
  if isinstance(policy, Mapping):
    return not all(isinstance(part, str | Policy) for part in policy.values())
  return not isinstance(policy, str | Policy | PolicyMap | None)


def _linen_subject(
  module: nn.Module, policies: PolicyMap, args: Sequence[Any], kwargs: dict[str, Any]
) -> Subject:
  plain = _plain_linen(module)
  if not args or not hasattr(args[0], "keys"):
    raise ValueError(
      "A Linen module needs its variables as the first argument after the policy, as `apply` does; "
      f"got {[type(arg).__name__ for arg in args]}. Pass {{'params': ...}}, then the inputs."
    )
  others = {name: value for name, value in args[0].items() if name != "params"}

  def apply(params: Any, others: Any, inputs: Any, kwargs: Any) -> Any:
    return plain.apply({"params": params, **others}, *inputs, **kwargs)

  call: Any = type(plain).__call__
  names = _parameter_names(call, 1 + len(args))[1:]
  return Subject(
    type(plain).__name__,
    apply,
    (args[0].get("params", {}), others, tuple(args[1:]), kwargs),
    {},
    ([True, STATE, False, False], {}),
    ["", "", names, ""],
    policies,
    scoping=LOCATED._replace(root=1, modules=modules_of([args[0]])),
    has_mutable=kwargs.get("mutable", False) is not False,
  )


def _plain_linen(module: nn.Module) -> nn.Module:
  """The module without the policy that `apply_policy` gave it."""
  plain = getattr(type(module), PLAIN, None)
  if plain is None:
    return module
  fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.init}
  return plain(**fields)


def _nnx_subject(
  name: str,
  fn: Callable[..., Any],
  policies: PolicyMap,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  labels: Sequence[str],
  flags: Sequence[bool],
  plain: type[nnx.Module] | None = None,
) -> Subject:
  call = pure_call(fn, args, kwargs, flags or [False] * len(args), plain)
  nodes = "" if len(call.nodes) > 1 else None  # the paths of several start with their numbers
  return Subject(
    name,
    call.fn,
    call.args,
    {},
    (call.flags, {}),
    [nodes, nodes, list(labels), ""],
    policies,
    scoping=LOCATED._replace(absolute=True),
    known=tuple(
      p for node in call.nodes if isinstance(node, nnx.Module) for p in module_paths(node)
    ),
  )


def has_shape(x: Any) -> bool:
  """Whether something is an array of a trace, or the shape of one."""
  return isinstance(x, jax.ShapeDtypeStruct) or is_traced(x)


def _parameter_names(fn: Callable[..., Any], count: int) -> list[str]:
  """The names of a function's first positional arguments."""
  try:
    parameters = list(inspect.signature(fn).parameters.values())
  except (TypeError, ValueError):  # some callables have no signature
    parameters = []
  names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  return [names[n] if n < len(names) else f"args[{n}]" for n in range(count)]


def _names(label: Any, value: Any) -> list[str]:
  """The names of the arrays in an argument."""
  if isinstance(label, list):
    return [name for part, entry in zip(label, value, strict=False) for name in _names(part, entry)]
  paths = [
    (path if label is not None else path[1:], leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
  ]
  return ["/".join(filter(None, [label, path_str(p)])) for p, leaf in paths if has_shape(leaf)]


def concrete(subject: Subject) -> None:
  """Refuse shapes where a tool must compute.

  Raises:
    TypeError: An argument holds a ``jax.ShapeDtypeStruct``.
  """
  leaves = jax.tree.leaves((subject.args, subject.kwargs))
  shapes = [x for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]
  if shapes:
    raise TypeError(
      f"The arguments must be arrays, for this runs the function; got {shapes[0]}. Pass values, or "
      "use mpjax.inspect.explain, which needs none."
    )


def is_real(x: Any) -> bool:
  """Whether an array or aval holds floats of any format."""
  return is_of(x, np.floating)
