"""The scale moves as the rules of its peers say: each restated here in a few lines of Python.

Forty random runs of 400 steps a peer: four intervals of growth, ten runs each. The states of a run
come from one scan; the rules are those of the sources, of jmp 0.0.4, Keras 3, tf_keras, torch 2,
Megatron-LM and DeepSpeed.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax

STEPS, RUNS = 400, 10
RATES = {3: 0.2, 5: 0.15, 20: 0.04, 50: 0.02}
"""How often a step is not finite, for each interval of growth: so that the scale goes both ways."""
LIMITS = {"min_scale": 2.0**-126, "max_scale": 2.0**126}


def torch(events, interval, scale=2.0**16, hysteresis=1):
  """``torch.amp.GradScaler.update``: neither floor nor ceiling."""
  good = 0
  for bad in events:
    good = 0 if bad else good + 1
    if bad:
      scale *= 0.5
    elif good == interval:
      scale, good = scale * 2, 0
    yield scale


def keras(events, interval, scale=2.0**15, hysteresis=1, floor=0.0):
  """``keras.optimizers.LossScaleOptimizer``; that of tf_keras has a floor of 1."""
  counter = 0
  for bad in events:
    if bad:
      scale, counter = max(scale / 2, floor), 0
    elif counter == interval - 1:
      scale, counter = scale * 2, 0
    else:
      counter += 1
    yield scale


def jmp(events, interval, scale=2.0**15, hysteresis=1):
  """``jmp.DynamicLossScale.adjust``."""
  counter = 0
  for bad in events:
    if bad:
      scale, counter = max(1.0, scale / 2), 0
    else:
      scale *= 2 if counter == interval - 1 else 1
      counter = (counter + 1) % interval
    yield scale


def megatron(events, interval, scale=2.0**15, hysteresis=2):
  """``DynamicGradScaler.update`` of Megatron-LM: hysteresis is refilled by growth alone."""
  good, left = 0, hysteresis
  for bad in events:
    if bad:
      good, left = 0, left - 1
      if left <= 0:
        scale = max(scale * 0.5, 1.0)
    else:
      good += 1
      if good == interval:
        good, left, scale = 0, hysteresis, scale * 2
    yield scale


def deepspeed(events, interval, scale=2.0**15, hysteresis=2, consecutive=False):
  """``DynamicLossScaler.update_scale`` of DeepSpeed, by the number of the step."""
  last, left = -1, hysteresis
  for n, bad in enumerate(events):
    if bad:
      if left == 1:
        scale = max(scale / 2, 1.0)
      else:
        left -= 1
      last = n
    else:
      left = hysteresis if consecutive else left
      if (n - last) % interval == 0:
        left, scale = hysteresis, scale * 2
    yield scale


PEERS = {
  "torch": (torch, {"init_scale": 2.0**16, **LIMITS}),
  "Keras": (keras, LIMITS),
  "tf_keras": (partial(keras, floor=1.0), {**LIMITS, "min_scale": 1}),
  "jmp": (jmp, {**LIMITS, "min_scale": 1}),
  "Megatron": (megatron, {**LIMITS, "min_scale": 1, "hysteresis": 2}),
  "Megatron, patient": (
    partial(megatron, hysteresis=4),
    {**LIMITS, "min_scale": 1, "hysteresis": 4},
  ),
  "DeepSpeed": (deepspeed, {**LIMITS, "min_scale": 1, "hysteresis": 2}),
  "DeepSpeed, consecutive": (
    partial(deepspeed, consecutive=True),
    {**LIMITS, "min_scale": 1, "hysteresis": 2, "consecutive_hysteresis": True},
  ),
}


def draw(interval):
  """Which steps are not finite: storms come with a run of their own now and then."""
  random = np.random.default_rng(interval)
  events = random.random((RUNS, STEPS)) < RATES[interval]
  for run, start in enumerate(random.integers(0, STEPS - 30, RUNS)):
    events[run, start : start + 3 * run] = True
  return events


def scales(tx, events):
  """The scale after each step of each run."""
  bad = jnp.array([jnp.inf, -jnp.inf, jnp.nan])

  def step(state, event):
    number, is_bad = event
    grads = jnp.where(is_bad, bad[number % 3], 1.0)
    _, state = tx.update(grads, state, grads)
    return state, state.scale

  def run(events):
    return jax.lax.scan(step, tx.init(jnp.zeros(())), (jnp.arange(STEPS), events))[1]

  return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(events)))


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("interval", RATES)
@pytest.mark.parametrize("peer", PEERS)
def test_forty_random_runs_have_the_scales_of_the_peer(peer, interval):
  rule, settings = PEERS[peer]
  tx = mpjax.dynamic_loss_scaling(optax.identity(), growth_interval=interval, **settings)
  events = draw(interval)
  expected = np.array([[*rule(run, interval)] for run in events])
  assert LIMITS["min_scale"] < expected.min() < expected.max() < LIMITS["max_scale"]
  np.testing.assert_array_equal(scales(tx, events), expected)


def deepspeed_fused(events, interval, scale=2.0**15):
  """``_update_scale`` of DeepSpeed's fused optimizer, which has a counter of its own."""
  last = -1
  for n, bad in enumerate(events):
    stable = n - last - 1
    if bad:
      scale, last = max(scale / 2, 1.0), n
    elif stable > 0 and stable % interval == 0:
      scale *= 2
    yield scale


def test_the_first_growth_of_deepspeeds_fused_optimizer_comes_one_step_later():
  """And every one that follows it: without skips its scales are ours, a step later."""
  tx = mpjax.dynamic_loss_scaling(optax.identity(), growth_interval=20, **LIMITS)
  events = np.zeros((1, STEPS), bool)
  theirs, ours = np.array([*deepspeed_fused(events[0], 20)]), scales(tx, events)[0]
  np.testing.assert_array_equal(theirs[1:], ours[:-1])
  assert (theirs[19], ours[19]) == (2.0**15, 2.0**16)
