"""What every tool does where mixed precision goes wrong, as observed: pass or fail.

    python -m benchmarks.peers.correctness

Each peer trains the tiny workloads on a CPU; see CHECKS for what is asked, and `PASSES` for what
counts as passed. Tools that are not installed are left out.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compilers

compilers.prepare("cpu", quick=True)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from flax.training.dynamic_scale import DynamicScale  # noqa: E402

import mpjax  # noqa: E402
from benchmarks import harness, report, workloads  # noqa: E402
from benchmarks.peers import flops, peers  # noqa: E402

BATCHES = 16
CHECKS = {
  "low_share": "share of matmul FLOPs in 16 bits",
  "gradient": f"gradient, relative error to float32 over {BATCHES} batches",
  "statistics": "running statistics after 300 steps, relative error to float32",
  "growth": "gradient around a growth of the scale, to the one before",
  "storm": "300 steps of NaN, then a good one",
  "batch_norm": "running statistics after one NaN step",
  "resume": "restored from an Orbax checkpoint, the next step",
  "embedding": f"gradient of a token seen {workloads.REPEATS} times",
  "shared": f"gradient of a weight used {workloads.REPEATS} times",
  "table": "share of matmul FLOPs in 16 bits behind a float32 table",
  "target": f"a float label of {workloads.ODD:g}",
}
STORM = 300
_SCALING = harness.Scaling(start=2.0**8, interval=2)


class Outcome(NamedTuple):
  """What was seen.

  Attributes:
    observed: in words or figures.
    passed: whether that is right; None where the tool does not claim to do it.
  """

  observed: str
  passed: bool | None


class Seen(NamedTuple):
  """The state of `recorder`.

  Attributes:
    rate: f32[], the learning rate.
    grads: the gradients of the last step, as the optimizer was given them.
  """

  rate: jax.Array
  grads: Any


def recorder() -> optax.GradientTransformation:
  """Gradient descent that remembers its gradients and has its rate in its state."""

  def init(params: Any) -> Seen:
    return Seen(jnp.float32(0), jax.tree.map(jnp.zeros_like, params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    return jax.tree.map(lambda g: -state.rate * g, grads), Seen(state.rate, grads)

  return optax.GradientTransformation(init, update)


def _is_seen(node: Any) -> bool:
  return isinstance(node, Seen)


def grads_of(state: harness.State) -> np.ndarray:
  """The last gradients that the optimizer saw, in one array."""
  nodes = jax.tree.leaves(state.opt_state, is_leaf=_is_seen)
  (seen,) = [node for node in nodes if _is_seen(node)]
  return _flat(seen.grads)


def at_rate(state: harness.State, rate: float) -> harness.State:
  """The state with another learning rate."""

  def change(node: Any) -> Any:
    return node._replace(rate=jnp.float32(rate)) if _is_seen(node) else node

  return state._replace(opt_state=jax.tree.map(change, state.opt_state, is_leaf=_is_seen))


def scale_of(state: harness.State) -> float | None:
  """The loss scale, wherever a peer keeps it; None if it has none."""
  scaler = state.scaler
  if isinstance(scaler, tuple):
    return float(scaler[0])
  if scaler is not None:
    return float(getattr(scaler, "scale" if isinstance(scaler, DynamicScale) else "loss_scaling"))
  try:
    return float(mpjax.loss_scale(state.opt_state))
  except ValueError:  # the optimizer has no scaler of mpjax's
    return None


def _flat(tree: Any) -> np.ndarray:
  leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
  return np.concatenate(leaves) if leaves else np.zeros(0)


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
  return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


class Run(NamedTuple):
  """A peer's compiled step on one workload.

  Attributes:
    step: `(state, inputs, labels) -> (state, loss)`.
    start: the state before the first step, at rate 0.
    good: a batch.
    bad: the same with one NaN in it.
  """

  step: Callable[..., tuple[harness.State, jax.Array]]
  start: harness.State
  good: tuple[np.ndarray, np.ndarray]
  bad: tuple[np.ndarray, np.ndarray]


def run_of(peer: peers.Peer, workload: workloads.Workload, policy: str) -> Run:
  """A peer's step on a workload; it is compiled once."""
  key = (peer.name, workload.name, policy)
  if key not in _runs:
    _runs[key] = _compile(peer, workload, policy)
  return _runs[key]


_runs: dict[tuple[str, str, str], Run] = {}
_parameters: dict[tuple[str, bool], Any] = {}


def _compile(peer: peers.Peer, workload: workloads.Workload, policy: str) -> Run:
  training = peer.build(workload, policy, recorder(), _SCALING)
  inputs, labels = workloads.batch_of(workload)
  kind = (workload.name, "haiku" in peer.packages)
  if kind not in _parameters:  # the same for every peer, and slow to make
    _parameters[kind] = jax.jit(training.model.init)(jax.random.key(0), inputs)
  start = training.begin(*_parameters[kind])
  return Run(jax.jit(training.step), start, (inputs, labels), (workloads.poisoned(inputs), labels))


def low_share(peer: peers.Peer, workload: workloads.Workload, policy: str) -> Outcome:
  """The share of the traced step's matmul FLOPs that are in 16 bits; nothing is computed."""
  training = peer.build(workload, policy, recorder(), _SCALING)
  state = jax.eval_shape(training.init, jax.random.key(0), workload.inputs)
  found = flops.contractions(training.step, state, workload.inputs, workload.labels)
  share = flops.low_share(found)
  return Outcome(f"{share:.1%}", share == 1)


def gradient(
  run: Run, plain: Run, hand: Run, plain_hand: Run, workload: workloads.Workload
) -> Outcome:
  """Gradients to those in float32: their error at most 1.25 times that of `dtype=` by hand."""
  error = _gradient_error(run, plain, workload)
  allowed = 1.25 * _gradient_error(hand, plain_hand, workload)
  return Outcome(f"{error:.2g}", error <= allowed)


def _gradient_error(run: Run, plain: Run, workload: workloads.Workload) -> float:
  """The root of the mean square over some batches."""
  errors = []
  for seed in range(BATCHES):
    batch = workloads.batch_of(workload, seed)
    got, wanted = (grads_of(one.step(one.start, *batch)[0]) for one in (run, plain))
    errors.append(_error(got, wanted))
  return float(np.sqrt(np.mean(np.square(errors))))


def statistics(run: Run, plain: Run) -> Outcome:
  """Running statistics after 300 times the same batch, compared with float32; no step counters."""
  ends = []
  for one in (run, plain):
    state = one.start
    for _ in range(STORM):
      state, _ = one.step(state, *one.good)
    ends.append(_flat([x for x in jax.tree.leaves(state.model_state) if x.dtype.kind != "i"]))
  error = _error(*ends)
  return Outcome(f"{error:.2g}", error < 0.01)


def growth(run: Run) -> Outcome:
  """Six good steps at rate 0, over which the scale grows: each must give the same gradient."""
  if scale_of(run.start) is None:
    return Outcome("no scaling", None)
  state, norms = run.start, []
  for _ in range(6):
    state, _ = run.step(state, *run.good)
    norms.append(np.linalg.norm(grads_of(state)))
  ratios = np.array(norms) / norms[0]
  worst = ratios[np.abs(ratios - 1).argmax()]
  return Outcome(f"{worst:.3g}", abs(worst - 1) < 0.02)


def storm(run: Run) -> Outcome:
  """300 steps of NaN must move no parameter, and the good step after them have its gradient."""
  start = at_rate(run.start, 0.1)
  wanted = grads_of(run.step(start, *run.good)[0])
  state = start
  for _ in range(STORM):
    state, _ = run.step(state, *run.bad)
  if not all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(start.params))):
    return Outcome("parameters are NaN", False)
  scale = scale_of(state)
  error = _error(grads_of(run.step(state, *run.good)[0]), wanted)
  return Outcome(f"kept; scale {scale:.2g}; gradient's error {error:.2g}", error < 0.05)


def batch_norm(run: Run) -> Outcome:
  """A step with NaN must leave the running statistics as they were."""
  if not jax.tree.leaves(run.start.model_state):
    return Outcome("none", None)
  after = _flat(run.step(run.start, *run.bad)[0].model_state)
  if np.array_equal(after, _flat(run.start.model_state)):
    return Outcome("unchanged", True)
  return Outcome("NaN" if np.isnan(after).any() else "moved", False)


def resume(run: Run) -> Outcome:
  """A state that Orbax saved and restored must give the next step's bits."""
  state = at_rate(run.start, 0.1)
  for _ in range(3):
    state, _ = run.step(state, *run.good)
  with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "state", run.start)
  ends = [jax.tree.leaves(run.step(one, *run.good)[0]) for one in (state, restored)]
  same = all(map(np.array_equal, *ends))
  return Outcome("same bits" if same else "differs", same)


def probe_gradient(peer: peers.Peer, name: str) -> Outcome:
  """The one gradient of a probe that is `REPEATS` by counting."""
  run = run_of(peer, workloads.PROBES[name], peer.policies[0])
  inputs = np.zeros_like(run.good[0]) if name == "embedding" else np.ones_like(run.good[0])
  largest = np.abs(grads_of(run.step(run.start, inputs, run.good[1])[0])).max()
  return Outcome(f"{largest:g}", largest == workloads.REPEATS)


def probe_target(peer: peers.Peer) -> Outcome:
  """The loss that is the label itself."""
  run = run_of(peer, workloads.PROBES["target"], peer.policies[0])
  _, loss = run.step(run.start, run.good[0], np.full(1, workloads.ODD, np.float32))
  return Outcome(f"{float(loss):g}", float(loss) == workloads.ODD)


def attempt(check: Callable[[], Outcome]) -> Outcome:
  """Runs a check; a tool that raises has failed it, and what it raised is what was observed."""
  try:
    return check()
  except Exception as error:
    first = str(error).splitlines()[0] if str(error) else ""
    return Outcome(f"{type(error).__name__}: {first[:80]}", False)


def rows_of(peer: peers.Peer, workload: workloads.Workload, full: Any) -> Iterator[report.Row]:
  """Every check of a peer on a workload.

  Args:
    peer: the tool.
    workload: the tiny workload, which is run.
    full: the workload that is traced only.
  """
  policy = peer.policies[0]
  reference = peers.HAIKU_FLOAT32 if peer.name == peers.HAIKU else peers.FLOAT32
  plain = run_of(peers.PEERS[reference], workload, policy)
  run = run_of(peer, workload, policy)
  hand = run_of(peers.PEERS[peers.BY_HAND], workload, policy)
  plain_hand = run_of(peers.PEERS[peers.FLOAT32], workload, policy)
  checks: dict[str, Callable[[], Outcome]] = {
    "low_share": partial(low_share, peer, full, policy),
    "gradient": partial(gradient, run, plain, hand, plain_hand, workload),
  }
  if jax.tree.leaves(run.start.model_state):
    checks["statistics"] = partial(statistics, run, plain)
  yield from _rows(peer, workload.name, policy, checks)
  policy = "mixed_float16"
  run = run_of(peer, workload, policy)
  checks = {
    "growth": partial(growth, run),
    "storm": partial(storm, run),
    "batch_norm": partial(batch_norm, run),
    "resume": partial(resume, run),
  }
  yield from _rows(peer, workload.name, policy, checks)


def probe_rows(peer: peers.Peer) -> Iterator[report.Row]:
  """Every probe of a peer."""
  policy = peer.policies[0]
  checks: dict[str, Callable[[], Outcome]] = {
    "embedding": partial(probe_gradient, peer, "embedding"),
    "shared": partial(probe_gradient, peer, "shared"),
    "table": partial(low_share, peer, workloads.PROBES["table"], policy),
  }
  if peer.name != peers.HAIKU:  # no part of it: its policy ends at the module
    checks["target"] = partial(probe_target, peer)
  yield from _rows(peer, "probes", policy, checks)


def _rows(
  peer: peers.Peer, workload: str, policy: str, checks: dict[str, Callable[[], Outcome]]
) -> Iterator[report.Row]:
  for name, check in checks.items():
    outcome = attempt(check)
    yield {
      "peer": peer.name,
      "workload": workload,
      "policy": policy,
      "check": name,
      "what": CHECKS[name],
      "observed": outcome.observed,
      "passed": None if outcome.passed is None else bool(outcome.passed),
    }


def first_step() -> report.Row:
  """Flax's scaler at its own start, on a loss that is itself float16."""

  def loss(w: jax.Array) -> jax.Array:
    return (w * jnp.float16(2)).astype(jnp.float16)

  _, finite, _, _ = DynamicScale().value_and_grad(loss)(jnp.float16(1))
  return _single("by hand + DynamicScale", "first step of a float16 loss of 2", bool(finite))


def first_step_here() -> report.Row:
  """The scaler of mpjax at its own start, on the same loss."""
  tx = mpjax.dynamic_loss_scaling(optax.sgd(0.1))
  params = {"w": jnp.float32(1)}
  state = tx.init(params)
  fn = mpjax.autocast(lambda p: p["w"] * 2, mpjax.Policy.parse("p=f32,c=f16,o=f16"))
  _, grads = mpjax.value_and_grad(fn)(params, loss_scale=mpjax.loss_scale(state))
  _, state = tx.update(grads, state, params)
  finite = bool(mpjax.step_is_finite(state))
  return _single(peers.INSIDE, "first step of a float16 loss of 2", finite)


def _single(peer: str, what: str, finite: bool) -> report.Row:
  return {
    "peer": peer,
    "workload": "probes",
    "policy": "mixed_float16",
    "check": "first_step",
    "what": what,
    "observed": "applied" if finite else "skipped",
    "passed": finite,
  }


def markdown(rows: list[report.Row]) -> str:
  """A table for each workload: a line for a peer, a column for a check."""
  parts = []
  for workload in dict.fromkeys(row["workload"] for row in rows):
    found = [row for row in rows if row["workload"] == workload]
    titles = {row["check"]: row["what"] for row in found}
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in found):
      cells = {row["check"]: _cell(row) for row in found if row["peer"] == peer}
      lines.append({"peer": peer, **cells})
    parts.append(f"## {workload}\n\n{report.table(lines, {'peer': 'peer', **titles})}\n")
  return "\n".join(parts)


def _cell(row: report.Row) -> str:
  verdict = {True: "pass: ", False: "**fail**: ", None: ""}[row["passed"]]
  return verdict + row["observed"]


# The tiny workload that is run, and the full one that is traced for its share of FLOPs.
SUBJECTS = {"gpt": "gpt-small", "vit": "vit-base", "resnet": "resnet-50", "lstm": "lstm-2x1024"}


def merge(old: list[report.Row], new: list[report.Row]) -> list[report.Row]:
  """Old rows, those that were checked again replaced, in the order of workloads and peers."""
  found = report.merged(old, new, ("workload", "peer", "check"))
  names, groups = list(peers.PEERS), ["probes", *SUBJECTS]
  ordered = sorted(found, key=lambda key: (groups.index(key[0]), names.index(key[1])))
  return [found[key] for key in ordered]


def write(rows: list[report.Row], folder: Path) -> None:
  """Adds rows to the results."""
  path = folder / "correctness.json"
  old = report.rows_in(path)
  rows = merge(old, rows)
  report.write(
    "correctness",
    "What every tool does where mixed precision goes wrong",
    "python -m benchmarks.peers.correctness",
    "CPU",
    rows,
    markdown(rows),
    folder,
  )


def subjects(names: list[str] | None, workload: workloads.Workload) -> list[peers.Peer]:
  """The peers that are checked on a workload; what Haiku's is compared with is none."""
  found = peers.chosen(names, "mixed_float16", workload)
  return [peer for peer in found if peer.name != peers.HAIKU_FLOAT32]


def main() -> None:
  """Runs every check; adds what was observed to the results."""
  parser = argparse.ArgumentParser(description="What every tool does where it can go wrong.")
  parser.add_argument("--workload", nargs="*", default=list(SUBJECTS), help="none: probes alone")
  parser.add_argument("--peers", nargs="+", help="names; all that are installed otherwise")
  parser.add_argument("--traced", choices=("full", "tiny"), default="tiny")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  probe = workloads.PROBES["embedding"]
  rows = [row for peer in subjects(arguments.peers, probe) for row in probe_rows(peer)]
  write([*rows, first_step(), first_step_here()], arguments.out)
  for name in arguments.workload:
    tiny = workloads.TINY[name]()
    full = workloads.FULL[SUBJECTS[name]]() if arguments.traced == "full" else tiny
    for peer in subjects(arguments.peers, tiny):
      print(f"{name} {peer.name} ...", file=sys.stderr, flush=True)
      write(list(rows_of(peer, tiny, full)), arguments.out)


if __name__ == "__main__":
  main()
