"""The strict session that every test runs in."""

import gc
import os
import tempfile

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import settings

import _coverage_table
from _turns import leave_the_rest_to_ci
from public import table as models_table

# What runs once is not worth optimizing: XLA reads this when it first compiles.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):
  QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # later versions have no other way
os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}".strip()

# Tests write many programs that others wrote before: these are compiled once. The process that
# starts the others names the folder; what one reads while another writes it is compiled again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _COMPILED = tempfile.TemporaryDirectory(prefix="mpjax-tests-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
# For the processes that tests start, too.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

if not os.environ.get("JAX_PLATFORMS"):
  jax.config.update("jax_platforms", "cpu")
gc.set_threshold(100_000, 20, 100)  # by default it takes a tenth of the time
# Eight devices stand in for a small mesh.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A script: to import it, in search of docstrings, is to run it.
collect_ignore = ["_user_script.py"]

# A first example compiles, which says nothing about the law under test.
settings.register_profile("mpjax", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("mpjax")


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
  """Each test counts its own traces."""
  chex.clear_trace_counter()


@pytest.fixture
def standard_promotion():
  """For code of optax or Flax that mixes dtypes and so raises under strict promotion."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def promotion_of_users():
  """For functions that are written as users write them, under JAX's default settings."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture
def standard_promotion_in_every_thread():
  """The same, where the code under test works in threads of its own."""
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  yield
  jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def params():
  """A small tree of float32 parameters."""
  return {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.full((3,), 0.5)}}


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(config, items):
  leave_the_rest_to_ci(items, whole=not any("[" in argument for argument in config.args))


def pytest_collection_finish():
  """What is imported stays: the collector of garbage need not look at it after every test."""
  gc.collect()
  gc.freeze()


def pytest_addoption(parser):
  parser.addoption(
    "--tables", action="store_true", help="end with the table of the coverage matrix"
  )


def pytest_terminal_summary(terminalreporter, config):
  """Ends a run of the `models` group, or one with ``--tables``, with its table."""
  reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
  kept = [entry for report in reports for entry in report.user_properties]
  tables = {"public models, errors relative to float32": models_table}
  if config.getoption("tables"):
    tables["coverage, errors in bfloat16 / float16 in units of the format"] = _coverage_table
  for title, module in tables.items():
    rows = [value for name, value in kept if name == module.RECORD]
    if rows:
      terminalreporter.write_sep("=", title)
      terminalreporter.write_line(module.table(rows))
