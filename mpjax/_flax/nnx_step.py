"""Train steps for NNX models."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from mpjax._core.dtypes import FLOAT32
from mpjax._core.policy_map import PolicyLike
from mpjax._core.tree_paths import PyTree
from mpjax._flax.dispatch import autocast
from mpjax._flax.nnx_calls import check_structure, fill, has_nodes, is_node, structure, update
from mpjax._flax.nnx_step_variables import (
  arrays_of,
  check_opt_state,
  check_trained,
  check_wrt,
  give_own_buffers,
  hold_placement,
  of_the_first,
  place_strays,
  restore_if_skipped,
  sorted_into,
  update_model,
)
from mpjax._scaling.scaled_gradients import split_aux
from mpjax._train.accumulation import Window, mean_loss, run_window
from mpjax._train.buffers import explain_if_deleted
from mpjax._train.low_precision_warning import UnscaledFloat16Check
from mpjax._train.shardings import NOWHERE, Placement, placement
from mpjax._train.step_core import StepCore, read_settings
from mpjax._train.step_parts import (
  StepMetrics,
  autocast_loss,
  check_aux,
  explain_if_no_array,
  in_words,
  raise_if_stuck,
)


class TrainStep:
  """A compiled train step, as `make_train_step` returns it: ``step(model, optimizer, *batch)``.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> step = make_train_step(lambda model, x: jnp.mean(model(x) ** 2))
    >>> metrics = step(model, optimizer, jnp.ones((4, 2)))
    >>> int(optimizer.step[...]), bool(metrics.applied)
    (1, True)
  """

  def __init__(
    self, jitted: Any, max_consecutive_skips: int | None, donate: bool, words: str
  ) -> None:
    self._jitted = jitted
    self._words = words
    self._limit = max_consecutive_skips
    self._donate = donate
    self._check_float16 = UnscaledFloat16Check()

  def __call__(
    self, model: Any, optimizer: Any = None, *batch: Any, **keywords: Any
  ) -> StepMetrics:
    """Takes one step, updating ``model`` and ``optimizer`` in place.

    Args:
      model: The model.
      optimizer: Its optimizer. An ``nnx.ModelAndOptimizer`` may come alone, in the place of both.
      *batch: What the loss function takes beside the model: pytrees of arrays, and graph nodes
        such as ``nnx.Rngs``, metrics or another model, whose updates arrive in them.
      **keywords: The same, by name.

    Returns:
      The metrics of the step.

    Raises:
      TypeError: If the first two are not a model and its optimizer, or a leaf of the batch is
        neither an array nor a graph node.
      NonFiniteError: If this was the last of ``max_consecutive_skips`` skipped steps.
      ValueError: If a step has taken the buffers of an argument already.
    """
    model, optimizer, batch = _read_arguments(model, optimizer, batch)
    variables, operands = arrays_of((model, optimizer)), Operands.of(batch, keywords)
    where = placement([*variables.values()])
    if where is not NOWHERE and place_strays((model, optimizer), variables):
      where = placement([*variables.values()])
    if self._donate:
      held = arrays_of(operands.nodes) if operands.nodes else ()
      others = jax.tree.leaves((operands.arrays, held))
      give_own_buffers((model, optimizer), variables, others)
    args = model, optimizer, (batch, keywords), where
    opt_state = optimizer.opt_state
    try:
      self._check_float16(opt_state, lambda: self._jitted.trace(*args).traced.jaxpr)
      metrics, bad = self._jitted(*args)
    except TypeError as error:
      explain_if_no_array(error, operands.by_name())
      raise
    except (RuntimeError, ValueError) as error:
      explain_if_deleted(error, _named(variables), _DELETED)
      raise
    if self._limit is not None:
      params = nnx.state(model, optimizer.wrt)
      raise_if_stuck(metrics, bad, params, self._limit, (model, optimizer))
    return metrics

  def __repr__(self) -> str:
    return f"<{type(self).__name__} of {self._words}>"

  def lower(self, model: Any, optimizer: Any = None, *batch: Any, **keywords: Any) -> Any:
    """Lowers the step for these arguments, to read what it costs.

    What is compiled of it takes and returns them in another form than the step does.

    Args:
      model: The model.
      optimizer: Its optimizer.
      *batch: What the loss function takes beside the model.
      **keywords: The same, by name.

    Returns:
      A lowered function; its ``compile()`` tells memory and cost.
    """
    model, optimizer, batch = _read_arguments(model, optimizer, batch)
    where = placement([*arrays_of((model, optimizer)).values()])
    try:
      traced = self._jitted.trace(model, optimizer, (batch, keywords), where)
    except TypeError as error:
      explain_if_no_array(error, Operands.of(batch, keywords).by_name())
      raise
    self._check_float16(optimizer.opt_state, lambda: traced.traced.jaxpr)
    return traced.lower()


_DELETED = (
  "A step that donates takes the buffers of model and optimizer. Got {}, of which a step has taken "
  "the buffer: another object held the same array, such as a clone, or a step was interrupted. "
  "Copy the arrays of one of the two (jax.tree.map(jnp.copy, nnx.state(model))), go back to a "
  "checkpoint, or make the step with donate=False."
)


def make_train_step(
  loss_fn: Callable[..., Any],
  *,
  has_aux: bool = False,
  policy: PolicyLike | None = None,
  accumulate: int = 1,
  max_consecutive_skips: int | None = None,
  donate: bool = True,
  reduce_dtype: Any = FLOAT32,
) -> TrainStep:
  """Makes the compiled train step of a loss function of an NNX model.

  The step differentiates ``loss_fn(model, batch)`` with respect to the Variables that the
  optimizer was made for (its ``wrt``), and updates model and optimizer in place; BatchNorm
  statistics, random streams and whatever else the loss changes in the model arrive there. It
  takes as many batches as the loss does, by position or by name, and graph nodes among them:
  ``step(model, optimizer, x, y, rngs=rngs)`` differentiates ``loss_fn(model, x, y, rngs=rngs)``.
  The optimizer is an ``nnx.Optimizer`` or an ``nnx.ModelAndOptimizer`` of this model, which may
  come alone: ``step(optimizer, batch)``.

  If the optimizer holds a loss scaler (`mpjax.dynamic_loss_scaling` as the outermost
  transformation), the loss is scaled, and a step is skipped if its gradients are not finite, or
  another Variable of the model would get an inf or NaN where there was a number: every Variable
  of model, optimizer and other graph nodes, ``optimizer.step`` included, stays as it was; only the
  scaler and the random streams move, so that the numbers that made a NaN are not drawn again.
  Without one, no operation of scaling or testing is in the compiled step. What the optimizer may
  take beside gradients, and what it leaves alone, is as for `mpjax.make_train_step`.

  With ``accumulate=k`` the leading axis of the batch is split into k micro-batches, whose float32
  gradients are averaged before one step is applied or skipped; see `mpjax.make_train_step`, and
  there what it assumes of the loss. What the loss changes in the model goes from one micro-batch
  into the next, random streams included; a skip puts back what was there before the first. A
  Variable that the loss adds is kept as the last micro-batch left it.

  Args:
    loss_fn: Takes the model and the batch; returns the loss, or ``(loss, aux)`` if ``has_aux``.
    has_aux: Whether ``loss_fn`` returns auxiliary output, for the metrics.
    policy: A policy to run the whole loss under; see `mpjax.nnx.autocast`. The results of
      ``loss_fn`` stay float32. Leave it out if the model is one of `mpjax.nnx.apply_policy`.
    accumulate: The number of micro-batches that a batch is computed in.
    max_consecutive_skips: After this many skipped steps in a row, raise on the host. Each step
      then waits for its result.
    donate: Whether the step reuses the buffers of model and optimizer. Arrays that another
      object shares with them, such as a clone's, are deleted by that.
    reduce_dtype: In which dtype gradients are summed over devices, as for
      `mpjax.make_train_step`.

  Returns:
    ``step(model, optimizer, *batch, **keywords) -> metrics``.

  Warns:
    LowPrecisionWarning: As for `mpjax.make_train_step`.

  Raises:
    ValueError: If a policy or ``reduce_dtype`` cannot be read, ``accumulate`` or
      ``max_consecutive_skips`` is below 1 or, when called, a limit is given without a loss scaler,
      trained parameters do not have the policy's param dtype, ``accumulate`` does not divide the
      batch, the loss scaler is not the outermost transformation, the optimizer's ``wrt`` matches
      no Variable, the optimizer was made for another model, an optimizer without a loss scaler has
      float16 state, or the loss sets, adds or deletes something in the model that is no Variable,
      which would be lost.
    TypeError: When called, if ``loss_fn`` returns something else than above, a trained Variable is
      no float, or a micro-batch changes the shape or dtype of a Variable.

  Example:
    >>> import jax.numpy as jnp
    >>> import mpjax
    >>> import optax
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
    >>> step = make_train_step(loss_fn, policy="mixed_float16")
    >>> metrics = step(model, optimizer, {"x": jnp.ones((4, 2)), "y": jnp.ones((4, 1))})
    >>> metrics.applied, metrics.loss_scale, model.kernel.dtype
    (Array(True, dtype=bool), Array(32768., dtype=float32), dtype('float32'))
  """
  settings = read_settings(policy, accumulate, max_consecutive_skips, reduce_dtype)
  run = autocast_loss(loss_fn, settings.policies, autocast)

  def train_step(
    model: nnx.Module, optimizer: nnx.Optimizer, given: tuple[Any, Any], where: Placement
  ) -> tuple[Any, Any]:
    operands = Operands.of(*given)
    nodes, batch = (model, *operands.nodes), operands.arrays
    paths = list(arrays_of((model, optimizer)))
    graphdef, *parts = nnx.split(nodes, of_the_first(optimizer.wrt), ...)
    check_wrt(parts, optimizer)
    params, opt_state = parts[0][0], nnx.as_pure(optimizer.opt_state)
    check_opt_state(optimizer, nnx.as_pure(params), opt_state)
    core = StepCore.begin(settings, optimizer.tx, nnx.as_pure(params), opt_state)
    before = arrays_of(nodes), opt_state, optimizer.step[...]

    def compute(wrt: nnx.State, rest: nnx.State, batch: PyTree) -> Any:
      copies = nnx.merge(graphdef, nnx.State({0: wrt}), rest, copy=True)
      out = operands.call(run, copies, batch)
      loss, aux = _loss_and_aux(out) if has_aux else (out, None)
      return loss, (nnx.state(copies), aux)

    def micro_step(parts: list[nnx.State], batch: PyTree, index: jax.Array | None) -> Window:
      wrt, rest = parts
      (loss, (changed, aux)), grads = core.differentiate(compute, wrt[0], rest, batch)
      if index is None:
        return Window(loss, [changed], ([], aux), grads)
      parts, added = sorted_into(parts, changed)
      return Window(loss, parts, ([added], aux), grads)

    def loss_at(params: nnx.State) -> Any:
      wrt = jax.tree.unflatten(jax.tree.structure(parts[0][0]), jax.tree.leaves(params))
      rest = parts[1]
      return mean_loss(lambda part, _: compute(wrt, rest, part)[0], settings.accumulate, batch)

    loss, changed, (added, aux), grads = run_window(
      micro_step, settings.accumulate, params, parts, batch
    )
    for state in [*changed, *jax.tree.map(lambda x: x[-1], added)]:
      update(nodes, state)
    check_trained(nodes[0], optimizer, params)
    update_model(core, nodes, optimizer, loss, grads, before[0], loss_at)
    metrics, bad = core.report(loss, grads, optimizer.opt_state, aux)
    if core.scaling is not None:
      restore_if_skipped(metrics.applied, nodes, optimizer, *before)
    hold_placement((model, optimizer), paths, where)
    return metrics, bad

  jitted = nnx.jit(train_step, donate_argnums=(0, 1) if donate else (), static_argnums=3)
  return TrainStep(jitted, settings.limit, donate, in_words(loss_fn, settings.policies))


class Operands(NamedTuple):
  """What a loss takes beside the model: its graph nodes apart from its arrays.

  Attributes:
    nodes: The graph nodes, in their order.
    arrays: The arguments with ``None`` in the places of the nodes; of a single positional argument
      that alone, so that errors name its arrays by their paths in it.
    tree: The structure of the arguments, whose leaves are the arrays and the nodes.
    single: Whether there is a single positional argument.
  """

  nodes: list[Any]
  arrays: Any
  tree: PyTree
  single: bool

  @classmethod
  def of(cls, batch: tuple[Any, ...], keywords: dict[str, Any]) -> "Operands":
    """Takes the arguments of a call apart."""
    single = len(batch) == 1 and not keywords
    leaves, tree = jax.tree.flatten(batch[0] if single else (batch, keywords), is_leaf=is_node)
    arrays = tree.unflatten([None if is_node(x) else x for x in leaves])
    return cls([x for x in leaves if is_node(x)], arrays, tree, single)

  def by_name(self) -> dict[str, Any]:
    """The arrays for a message: those by position as the batch, the others by their keywords."""
    batch, keywords = (self.arrays, {}) if self.single else self.arrays
    return {"batch": batch, **keywords}

  def call(self, fn: Callable[..., Any], nodes: Sequence[Any], arrays: Any) -> Any:
    """Calls a function of the model and these operands with other nodes and arrays.

    Args:
      fn: The function.
      nodes: The model, and the graph nodes in the places of these.
      arrays: The arrays in the places of these.

    Raises:
      ValueError: If the call changes something in a node that is no Variable.
    """
    as_given = structure(nodes)
    whole = fill(self.tree, arrays, nodes[1:])
    args, keywords = ((whole,), {}) if self.single else whole
    out = fn(nodes[0], *args, **keywords)
    check_structure(as_given, structure(nodes))
    return out


def _loss_and_aux(out: Any) -> tuple[Any, Any]:
  """Splits what a loss with ``aux`` returned; beside graph nodes that holds arrays alone."""
  loss, aux = split_aux(out)
  check_aux(jax.tree.map(lambda x: None if is_node(x) else x, aux, is_leaf=is_node))
  return loss, aux


def _read_arguments(
  model: Any, optimizer: Any, batch: tuple[Any, ...]
) -> tuple[nnx.Module, nnx.Optimizer, tuple[Any, ...]]:
  """The model, its optimizer and the batch; a `nnx.ModelAndOptimizer` alone is the first two.

  Raises:
    TypeError: If the first two are something else, or in another order.
  """
  if isinstance(model, nnx.ModelAndOptimizer):
    rest = () if optimizer is None else (optimizer,)
    return model.model, model, (*rest, *batch)
  if isinstance(model, nnx.Optimizer):
    got = "the optimizer first"
  elif not has_nodes(model):
    got = f"{type(model).__name__} for the model"
  elif not isinstance(optimizer, nnx.Optimizer):
    got = f"{type(optimizer).__name__} for the optimizer"
  else:
    return model, optimizer, batch
  raise TypeError(
    f"An NNX step takes a model, its optimizer and a batch. Got {got}. Write "
    "step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), batch)."
  )


def _named(variables: dict[Any, Any]) -> list[tuple[str, Any]]:
  """The arrays of model and optimizer with paths from each of the two."""
  return [("/".join(map(str, path[1:])), x) for path, x in variables.items()]
