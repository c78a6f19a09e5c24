"""The run behind `mpjax compare`: one job trained from one seed under several policies."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from mpjax import Policy
from mpjax._core.ctrl_c import handled_by
from mpjax._demo.elsewhere import elsewhere
from mpjax._demo.jobs import Job, Metric, Outcome, Session
from mpjax._demo.progress import Progress
from mpjax._demo.run_checkpoints import Checkpoints
from mpjax.plot import Curve

# The final training loss is the mean over this many applied steps: one batch alone is noise.
_FINAL_STEPS = 20
_CHECKPOINTS = 10
_TIMED_ROUNDS = 20
_TIMED_SECONDS = 6.0


@dataclass(frozen=True)
class Plan:
  """What every policy is trained with.

  Attributes:
    steps: The number of training steps, skipped ones counted in.
    batch_size: The number of examples of a step.
    seed: Decides the initial values and the batches.
  """

  steps: int
  batch_size: int
  seed: int


@dataclass(frozen=True)
class Result:
  """What became of one policy.

  Attributes:
    policy: The policy.
    curve: The course of the training, labelled with the policy as it was asked for.
    metric: The job's metric on held-out data; ``None`` if the training was cut short.
    argument_bytes: The arguments of the compiled step; ``None`` if the compiler does not say.
    temp_bytes: What the compiled step needs besides; ``None`` if the compiler does not say.
    compile_seconds: The time to trace and compile the step.
    step_ms: The median time of a step.
  """

  policy: Policy
  curve: Curve
  metric: float | None
  argument_bytes: int | None
  temp_bytes: int | None
  compile_seconds: float
  step_ms: float

  @property
  def steps(self) -> int:
    """The number of steps taken, skipped ones counted in."""
    return len(self.curve.losses)

  @property
  def skipped(self) -> int:
    """The number of skipped steps."""
    return int(np.sum(~self.curve.applied))

  @property
  def train_loss(self) -> float:
    """The mean loss of the last 20 applied steps; NaN if none was applied."""
    applied = self.curve.losses[self.curve.applied]
    return float(np.mean(applied[-_FINAL_STEPS:])) if len(applied) else math.nan

  @property
  def loss_scale(self) -> float:
    """The loss scale that the last step used."""
    return float(self.curve.scales[-1])


@dataclass(frozen=True)
class Comparison:
  """What `compare` found.

  Attributes:
    job: The name of the job.
    metric: What the held-out numbers are.
    plan: What every policy was trained with.
    results: One result a policy, in the order asked for; the policies that took no step by the
      time of an interrupt are missing.
    interrupted: Whether Ctrl-C ended it early.
  """

  job: str
  metric: Metric
  plan: Plan
  results: tuple[Result, ...]
  interrupted: bool

  def rows(self) -> list[dict[str, Any]]:
    """One JSON object a policy; what is unknown or not finite is ``None``."""
    return [{key: _json(value) for key, value in self._row(r).items()} for r in self.results]

  def _row(self, result: Result) -> dict[str, Any]:
    return {
      "job": self.job,
      "policy": result.curve.label,
      "param_dtype": result.policy.param_dtype.name,
      "compute_dtype": result.policy.compute_dtype.name,
      "output_dtype": result.policy.output_dtype.name,
      "train_loss": result.train_loss,
      "metric_name": self.metric.name,
      "metric": result.metric,
      "steps": result.steps,
      "skipped": result.skipped,
      "loss_scale": result.loss_scale,
      "argument_bytes": result.argument_bytes,
      "temp_bytes": result.temp_bytes,
      "step_ms": result.step_ms,
      "compile_seconds": result.compile_seconds,
      "batch_size": self.plan.batch_size,
      "seed": self.plan.seed,
      "complete": result.metric is not None,
    }


def compare(
  job: Job,
  policies: Mapping[str, Policy],
  plan: Plan,
  progress: Progress,
  checkpoint: Path | None = None,
) -> Comparison:
  """Trains a job under each policy in turn, then times their steps in turns.

  Ctrl-C ends it after the step at hand, with what there is; a checkpoint is written first. What
  traces or compiles then is left behind, at work.

  Args:
    job: The job.
    policies: The policies by the name to report them under.
    plan: What every policy is trained with.
    progress: Where to show how far it is.
    checkpoint: Where to write checkpoints, and to go on from those there.

  Returns:
    The report.

  Raises:
    UsageError: If checkpoints were written with other settings.
  """
  runs: list[_Run] = []
  interrupted = False
  interrupts = _Interrupts(progress.say)
  with handled_by(interrupts.handle), ExitStack() as stack:
    # All are opened, and so checked, before the first policy takes its time.
    saved = {
      name: stack.enter_context(_checkpoints(checkpoint, job, policy, plan))
      for name, policy in policies.items()
    }
    try:
      for name, policy in policies.items():
        with progress.run(name, plan.steps):
          start = partial(job.start, policy, plan.steps, plan.seed)
          session = elsewhere(start, interrupts.check)
          runs.append(_Run(job, name, policy, plan, session, saved[name]))
          runs[-1].train(progress, interrupts)
      _time_in_turns(runs, interrupts)
    except KeyboardInterrupt:
      interrupted = True
  results = tuple(run.result() for run in runs if run.done)
  return Comparison(job.name, job.metric, plan, results, interrupted)


class _Run:
  """The training of a job under one policy."""

  def __init__(
    self,
    job: Job,
    name: str,
    policy: Policy,
    plan: Plan,
    session: Session,
    saved: Checkpoints | None,
  ) -> None:
    self._job, self._name, self._plan, self._policy = job, name, plan, policy
    self._saved = saved
    self._session = session
    self._metric: float | None = None
    self._history = {
      "losses": np.full(plan.steps, np.nan, np.float32),
      "scales": np.full(plan.steps, np.nan, np.float32),
      "applied": np.zeros(plan.steps, np.bool_),
    }
    self._memory: Any = None
    self._compile_seconds = 0.0
    self._training_times: list[float] = []
    self.done = 0
    self.times: list[float] = []

  def train(self, progress: Progress, interrupts: _Interrupts) -> None:
    """Compiles, trains from the last checkpoint on if there is one, and evaluates.

    Raises:
      KeyboardInterrupt: After the step at hand, if Ctrl-C was pressed.
    """
    self._restore()
    self._compile(interrupts)
    if self.done:
      progress.update(self.done, *self._shown())
    every = max(1, self._plan.steps // _CHECKPOINTS)
    while self.done < self._plan.steps and not interrupts.pressed:
      self._training_times.append(self.step())
      progress.update(self.done, *self._shown())
      if self.done % every == 0:
        self._save()
    if self.done:
      self._save()
    interrupts.check()
    self._metric = elsewhere(self._session.evaluate, interrupts.check)

  def step(self) -> float:
    """Takes the next step, keeps what it reports, and returns its seconds."""
    batch = self._batch(self.done)
    began = time.perf_counter()
    outcome = jax.device_get(self._session.step(batch))
    seconds = time.perf_counter() - began
    self._record(outcome)
    return seconds

  def time_step(self) -> None:
    """Takes a step beyond the training, for its time alone."""
    batch = self._batch(0)
    began = time.perf_counter()
    jax.block_until_ready(self._session.step(batch))
    self.times.append(time.perf_counter() - began)

  def result(self) -> Result:
    """What became of this policy up to now."""
    history = {key: values[: self.done] for key, values in self._history.items()}
    return Result(
      policy=self._policy,
      curve=Curve(self._name, **history),
      metric=self._metric,
      argument_bytes=getattr(self._memory, "argument_size_in_bytes", None),
      temp_bytes=getattr(self._memory, "temp_size_in_bytes", None),
      compile_seconds=self._compile_seconds,
      step_ms=1e3 * statistics.median(self.times or self._training_times or [math.nan]),
    )

  def _batch(self, index: int) -> Any:
    return self._job.batch(index, self._plan.batch_size, self._plan.seed)

  def _record(self, outcome: Outcome) -> None:
    self._history["losses"][self.done] = outcome.loss
    self._history["scales"][self.done] = outcome.loss_scale
    self._history["applied"][self.done] = outcome.applied
    self.done += 1

  def _shown(self) -> tuple[float, float, int]:
    last = self.done - 1
    skipped = self.done - int(self._history["applied"].sum())
    return float(self._history["losses"][last]), float(self._history["scales"][last]), skipped

  def _compile(self, interrupts: _Interrupts) -> None:
    batch = self._batch(0)
    began = time.perf_counter()
    compiled = elsewhere(lambda: self._session.lower(batch).compile(), interrupts.check)
    self._compile_seconds = time.perf_counter() - began
    self._memory = compiled.memory_analysis()

  def _tree(self) -> dict[str, Any]:
    done = np.asarray(self.done, np.int32)
    return {"done": done, "history": self._history, "session": self._session.state()}

  def _save(self) -> None:
    if self._saved is not None:
      self._saved.save(self.done, self._tree())

  def _restore(self) -> None:
    tree = self._saved.restore(self._tree()) if self._saved is not None else None
    if tree is not None:
      self.done = int(tree["done"])
      self._history = {key: np.array(values) for key, values in tree["history"].items()}
      self._session.restore(tree["session"])


def _time_in_turns(runs: list[_Run], interrupts: _Interrupts) -> None:
  """Times the steps of all runs alternately, so that a busy machine slows them all alike."""
  began = time.perf_counter()
  for _ in range(_TIMED_ROUNDS):
    for run in runs:
      interrupts.check()
      run.time_step()
    if time.perf_counter() - began > _TIMED_SECONDS:
      break


class _Interrupts:
  """Whether Ctrl-C was pressed, to be asked where it is safe to stop: between steps.

  A step that is cut in two would leave its donated state deleted.
  """

  def __init__(self, say: Callable[[str], None]) -> None:
    self.pressed = False
    self._say = say

  def check(self) -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed."""
    if self.pressed:
      raise KeyboardInterrupt

  def handle(self, number: int, frame: FrameType | None) -> None:
    """Notes the first Ctrl-C; the second one interrupts at once."""
    self.check()
    self.pressed = True
    self._say("stopping after the step at hand; Ctrl-C again stops at once")


def _checkpoints(
  root: Path | None, job: Job, policy: Policy, plan: Plan
) -> AbstractContextManager[Checkpoints | None]:
  if root is None:
    return nullcontext()
  settings = {
    "job": job.name,
    "data": job.fingerprint,
    "policy": str(policy),
    "steps": plan.steps,
    "batch-size": plan.batch_size,
    "seed": plan.seed,
  }
  dtypes = (policy.param_dtype, policy.compute_dtype, policy.output_dtype)
  names = [*(dtype.name for dtype in dtypes), policy.matmul_format]
  return Checkpoints(root / "-".join(filter(None, names)), settings)


def _json(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
