"""What runs under a policy says so: which policy it is, what it was without, how it pickles."""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from flax import linen as nn
from flax import nnx

from mpjax._core.policy import Policy, spec
from mpjax._core.policy_map import PolicyMap
from mpjax._engine.running.scaled_cotangents import UNSCALED

PLAIN, POLICIES, _MADE = "mpjax_plain_class", "mpjax_policies", "mpjax_made"


def policy_of(x: Any) -> Policy | PolicyMap | None:
  """The policy that a module or function was given.

  It is the outermost: what `mpjax.apply_policy` made of this very module, or `mpjax.autocast` of
  this very function. A submodule is governed by the policies around it and has none of its own,
  unless it was given one, which then governs it instead. Functions that ``functools.wraps``,
  ``jax.jit`` and JAX's other transformations make carry the mark of the function that they wrap.

  Args:
    x: A Linen module, an NNX model, or a function; anything else has no policy.

  Returns:
    The `Policy`; the `PolicyMap` if it has rules or changes of operations. None if there is none.

  Example:
    >>> import mpjax
    >>> from flax import linen as nn
    >>> model = mpjax.apply_policy(nn.Dense(4), "mixed_bfloat16")
    >>> print(mpjax.policy_of(model))
    params=float32,compute=bfloat16,output=float32
    >>> mpjax.policy_of(nn.Dense(4)) is None
    True
  """
  policies = policies_of(x)
  if policies is None or policies.rules or policies.ops:
    return policies
  return policies.default


def policies_of(x: Any) -> PolicyMap | None:
  """`policy_of` as a map."""
  holder = type(x) if isinstance(x, nn.Module | nnx.Pytree) else x
  found = getattr(holder, POLICIES, None)
  return found if isinstance(found, PolicyMap) else None


def refuse_module(x: Any, function: str, wanted: str, other: str) -> NoReturn:
  """Refuses what one of the two ``apply_policy`` cannot take, and names what can.

  Args:
    x: What came.
    function: Which function it came to.
    wanted: What that takes.
    other: The function for modules of the other kind.

  Raises:
    TypeError: Always.
  """
  if isinstance(x, nn.Module | nnx.Module):
    kind = "Linen module" if isinstance(x, nn.Module) else "NNX model"
    got, instead = f"the {kind} {type(x).__name__}", f"Use mpjax.apply_policy or {other}"
  elif isinstance(x, type) and issubclass(x, nn.Module | nnx.Module):
    got, instead = f"the class {x.__name__}", "Make an instance first"
  else:
    got, instead = type(x).__name__, "For a function use mpjax.autocast"
  raise TypeError(f"{function} takes {wanted}. Got {got}. {instead}.")


def mark(fn: Callable[..., Any], policies: PolicyMap) -> None:
  """Write on a function that it runs under a policy map, for `policy_of`."""
  setattr(fn, POLICIES, policies)


def plain_class(cls: type[Any]) -> type[Any]:
  """The class of a module without the policy that `apply_policy` gave it."""
  return getattr(cls, PLAIN, cls)


def subclass(
  plain: type[Any], root: Any, namespace: dict[str, Any], base: Any = None, metaclass: Any = None
) -> Any:
  """A subclass that passes for a module class, with other attributes.

  A user's base class may look at its subclasses. It is shown this one under another name, so that
  those that it registers by name stay what they were; if it asks for keywords, which a class
  statement alone gives, it is shown none, and Flax's own ``__init_subclass__`` runs.

  Args:
    plain: The module class.
    root: What that is a subclass of: ``nn.Module`` or ``nnx.Module``.
    namespace: The attributes.
    base: What else is to be its base: a subclass of ``plain``.
    metaclass: Its metaclass, if not that of ``plain``.
  """
  base = plain if base is None else base
  bases = (_without_hooks(root), base) if asks_for_keywords(base) else (base,)
  flax = {each.__init_subclass__.__func__ for each in (root, _without_hooks(root))}
  is_told = bases[0].__init_subclass__.__func__ in flax
  is_pytree = getattr(plain, "_pytree__is_pytree", True)
  keywords = {"pytree": False} if is_told and not is_pytree else {}
  described = {key: getattr(plain, key) for key in ("__module__", "__doc__")}
  make: Any = metaclass or type(plain)
  made = make(f"{plain.__name__} under a policy", bases, namespace | described, **keywords)
  made.__name__, made.__qualname__ = plain.__name__, plain.__qualname__
  return made


def asks_for_keywords(cls: type[Any]) -> bool:
  """Whether a subclass of a class must be given keywords."""
  asked = inspect.signature(cls.__init_subclass__).parameters.values()
  named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
  return any(each.kind in named and each.default is inspect.Parameter.empty for each in asked)


@functools.cache
def _without_hooks(root: Any) -> type[Any]:
  """A subclass of Flax's that shows no subclass to a base class behind it.

  One of Flax's, so that an object may change from the user's class to ours.
  """

  def run(cls: type[Any], **keywords: Any) -> None:
    root.__init_subclass__.__func__(cls, **keywords)

  made = type(root)("_WithoutHooks", (root,), {"__init_subclass__": classmethod(run)})
  for name in {*vars(made)} - {"__init_subclass__", *vars(type("Nothing", (), {}))}:
    delattr(made, name)  # what Flax writes into each subclass would hide the user's
  return made


def in_words(policies: PolicyMap, loss_scale: float = UNSCALED) -> str:
  """A policy map in a few words, for a table or a repr.

  Example:
    >>> in_words(PolicyMap({"head": "float32"}, default="mixed_bfloat16"))
    'mixed_bfloat16, 1 rule'
  """
  changes = (("rule", len(policies.rules)), ("op", len(policies.ops)))
  counts = [f"{count} {what}{'s' * (count > 1)}" for what, count in changes if count]
  scale = [] if loss_scale == UNSCALED else [f"loss scale {loss_scale:.9g}"]
  return ", ".join([spec(policies.default), *counts, *scale])


def facts(plain: type[Any], policies: PolicyMap, make: Callable[..., Any], *more: Any) -> Any:
  """The attributes of the class of modules under a policy map that are not its methods.

  Args:
    plain: The class without the policy.
    policies: The policies.
    make: The function of this module's level that makes the class.
    *more: What it takes beside ``plain`` and ``policies``.
  """

  def reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    """Pickles by the plain class: that of the policy is made anew and has no name to find."""
    inherited: Any = plain.__reduce_ex__
    if _MADE not in vars(type(self)):  # a subclass, which has a name
      return inherited(self, protocol)
    maker, args, *state = inherited(self, protocol)
    own = tuple(plain if arg is type(self) else arg for arg in args)
    return _made_again, (make, (plain, policies, *more), maker, own), *state

  made = make, (plain, policies, *more)
  return {PLAIN: plain, POLICIES: policies, _MADE: made, "__reduce_ex__": reduce}


@functools.cache
def pickling(metaclass: type[Any]) -> Any:
  """A metaclass whose classes, with `facts`, pickle by what made them: graphdefs hold them."""
  own = type(metaclass.__name__, (metaclass,), {})
  copyreg.pickle(own, lambda cls: vars(cls).get(_MADE, cls.__qualname__))
  return own


def _made_again(
  make: Callable[..., type[Any]], of: tuple[Any, ...], maker: Callable[..., Any], args: Any
) -> Any:
  module = maker(*args)
  object.__setattr__(module, "__class__", make(*of))
  return module
