"""A call of a user's function for the reports: its parameters, its modules, and pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy_map import PolicyMap
from mpjax._engine.autocast import positions
from mpjax._engine.execute import Decided, decide
from mpjax._engine.plan import Scoping
from mpjax._flax.nnx_calls import has_nodes, pure_call


class Objective:
  """A function with arguments, NNX models among them or not, as a pure function of pytrees.

  Args:
    fn: The function.
    args: Its positional arguments.
    argnums: Which of them hold parameters.
    has_aux: Whether it returns a pair, of which the first counts.

  Attributes:
    operands: The arguments of the pure function.
    has_models: Whether there are NNX models among the arguments.
  """

  def __init__(
    self,
    fn: Callable[..., Any],
    args: Sequence[Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
  ) -> None:
    numbers = {argnums} if isinstance(argnums, int) else set(argnums)
    inside = positions(numbers, len(args))
    flags = [n in inside for n in range(len(args))]
    self.has_models = has_nodes(tuple(args))
    self._has_aux = has_aux
    if self.has_models:
      pure = pure_call(fn, args, {}, flags)
      self._fn = lambda *operands: pure.fn(*operands)[0]
      self.operands, self._flags = pure.args, pure.flags
      self._wrt: tuple[int, ...] = (0,)
    else:
      self._fn, self.operands, self._flags = fn, tuple(args), flags
      self._wrt = tuple(sorted(inside))

  @property
  def params(self) -> Any:
    """The operands that hold the parameters; one alone as it is."""
    chosen = tuple(self.operands[n] for n in self._wrt)
    return chosen[0] if len(chosen) == 1 else chosen

  def decide(self, policies: PolicyMap) -> Decided:
    """The call traced and planned under a policy map, without running it."""
    return self._decide(policies, self.operands, located=True)

  def _decide(
    self, policies: PolicyMap, operands: Sequence[Any], *, located: bool = False
  ) -> Decided:
    scoping = Scoping(absolute=self.has_models, located=located)
    return decide(self.value, policies, operands, {}, (self._flags, {}), scoping=scoping)

  def value(self, *operands: Any) -> Any:
    """What the function returns, without auxiliary output."""
    out = self._fn(*operands)
    return out[0] if self._has_aux else out

  def under(self, policies: PolicyMap) -> Callable[..., Any]:
    """The pure function under a policy map; its results are float32."""
    if policies.is_float32():
      return self.value

    return lambda *operands: self._decide(policies, operands).run().cast(FLOAT32)

  def value_and_grad(self, policies: PolicyMap, scale: float = 1.0) -> Callable[..., Any]:
    """The loss and the gradients of the parameters, through the loss times a scale."""
    run = self.under(policies)

    def scaled(*operands: Any) -> tuple[Any, Any]:
      loss = run(*operands)
      return (loss if scale == 1 else loss * scale), loss

    def both(*operands: Any) -> tuple[Any, Any]:
      wrt = self._wrt[0] if len(self._wrt) == 1 else self._wrt
      grads, loss = jax.grad(scaled, wrt, has_aux=True)(*operands)
      return loss, grads if scale == 1 else jax.tree.map(lambda g: g / scale, grads)

    return both
