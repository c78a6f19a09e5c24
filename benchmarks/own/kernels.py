"""Fused kernels that others wrote, under a policy, as compiled for a TPU v5e or an H100.

    python -m benchmarks.own.kernels --target v5e

A projection into each kernel, the kernel, a sum of squares, forward and backward: in float32, by
hand (parameters and inputs cast to bfloat16), under ``mixed_bfloat16``, and so with the kernel
marked by `mpjax.cast_inputs`. The v5e has the Pallas kernels that JAX comes with, the H100 cuDNN's
attention. No device is needed. Bytes moved are the TPU compiler's count, or read off the GPU
program's text.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import compilers, report

BATCH, LENGTH, HEADS, FEATURES, EXPERTS = 2, 1024, 4, 128, 4
WIDTH = HEADS * FEATURES
COLUMNS = {
  "target": "target",
  "kernel": "kernel",
  "peer": "as",
  "narrow": "kernels that return 16 bits",
  "gbytes": "GB moved",
  "ratio": "to by hand",
  "temp_mib": "temp MiB",
}
KERNEL = {
  "v5e": r'= (\S[^=]*?) custom-call\([^)]*\), custom_call_target="tpu_custom_call"',
  "h100": r'= (\S[^=]*?) custom-call\([^)]*\), custom_call_target="__cudnn\$fmha',
}


def kernels(target: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
  """The kernels of a target: for each what a model does around it, and the kernel."""
  import jax

  if target == "h100":

    def cudnn(query: Any, key: Any, value: Any) -> Any:
      kernel = "cudnn"
      return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=kernel)

    return {"cuDNN attention": (attention_by_length, cudnn)}

  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
  from jax.experimental.pallas.ops.tpu.megablox import ops
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  def flash(query: Any, key: Any, value: Any) -> Any:
    return flash_attention(query, key, value, causal=True)

  def grouped(rows: Any, experts: Any, sizes: Any) -> Any:
    return ops.gmm(rows, experts, sizes, rows.dtype)

  mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS)
  return {
    "Pallas flash attention": (attention, flash),
    "Pallas splash attention": (
      attention,
      jax.vmap(splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)),
    ),
    "megablox gmm": (experts, grouped),
  }


def attention(kernel: Callable[..., Any], params: Any, x: Any) -> Any:
  """A loss around an attention that takes [batch, heads, length, features]."""

  def turned(*operands: Any) -> Any:
    return kernel(*(x.transpose(0, 2, 1, 3) for x in operands)).transpose(0, 2, 1, 3)

  return attention_by_length(turned, params, x)


def attention_by_length(kernel: Callable[..., Any], params: Any, x: Any) -> Any:
  """A loss around an attention that takes [batch, length, heads, features]."""
  made = (x @ params[name] for name in ("query", "key", "value"))
  out = kernel(*(x.reshape(BATCH, LENGTH, HEADS, FEATURES) for x in made))
  return squares(out.reshape(BATCH, LENGTH, WIDTH) @ params["out"])


def experts(kernel: Callable[..., Any], params: Any, x: Any) -> Any:
  """A loss around a matmul in which groups of rows have each their own matrix."""
  import jax.numpy as jnp

  rows = (x @ params["query"]).reshape(-1, WIDTH)
  sizes = jnp.full(EXPERTS, len(rows) // EXPERTS, jnp.int32)
  return squares(kernel(rows, params["experts"], sizes))


def squares(x: Any) -> Any:
  """The sum of squares, in float32."""
  import jax.numpy as jnp

  return jnp.sum(jnp.square(x.astype(jnp.float32)))


def losses(around: Callable[..., Any], kernel: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
  """The loss around a kernel as each peer has it."""
  import jax.numpy as jnp

  import mpjax

  def plain(params: Any, x: Any) -> Any:
    return around(kernel, params, x)

  def marked(params: Any, x: Any) -> Any:
    return around(mpjax.cast_inputs(kernel), params, x)

  def by_hand(params: Any, x: Any) -> Any:
    return plain(*mpjax.cast_floating((params, x), jnp.bfloat16))

  return {
    "float32": plain,
    "by hand": by_hand,
    "mixed_bfloat16": mpjax.autocast(plain, "mixed_bfloat16"),
    "mixed_bfloat16, cast_inputs": mpjax.autocast(marked, "mixed_bfloat16"),
  }


def measure(target: str, name: str, peer: str, loss: Callable[..., Any]) -> report.Row:
  """Compiles a loss and its gradients; returns the row."""
  import jax
  import jax.numpy as jnp

  from mpjax.inspect._compiled_text import moved

  matrix = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
  params: dict[str, Any] = dict.fromkeys(("query", "key", "value", "out"), matrix)
  params["experts"] = jax.ShapeDtypeStruct((EXPERTS, WIDTH, WIDTH), jnp.float32)
  x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
  row = {
    "target": target,
    "kernel": name,
    "peer": peer,
    "date": time.strftime("%Y-%m-%d", time.gmtime()),
  }
  try:
    compiled = compilers.compile_for(target, jax.value_and_grad(loss), (params, x))
  except NotImplementedError as error:  # a kernel that has no float32 form
    return row | {"narrow": f"raises {type(error).__name__}"}
  text = compiled.as_text()
  results = re.findall(KERNEL[target], text)
  bytes_moved = moved(text) if target == "h100" else compiled.cost_analysis()["bytes accessed"]
  narrow = sum(result.lstrip("(").startswith("bf16") for result in results)
  return row | {
    "narrow": f"{narrow} of {len(results)}",
    "gbytes": round(bytes_moved / 1e9, 3),
    "temp_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
  }


def main() -> None:
  """Compiles every kernel of a target for every peer; adds them to the results."""
  parser = argparse.ArgumentParser(description="Fused kernels under a policy, compiled.")
  parser.add_argument("--target", choices=tuple(KERNEL), default="v5e")
  parser.add_argument("--out", type=Path, default=report.RESULTS, help="the folder of results")
  arguments = parser.parse_args()
  compilers.prepare(arguments.target)
  rows = []
  for name, (around, kernel) in kernels(arguments.target).items():
    of_kernel = []
    for peer, loss in losses(around, kernel).items():
      print(f"{name}: {peer} ...", file=sys.stderr, flush=True)
      of_kernel.append(measure(arguments.target, name, peer, loss))
    (hand,) = (row["gbytes"] for row in of_kernel if row["peer"] == "by hand")
    rows += [
      row | ({"ratio": round(row["gbytes"] / hand, 2)} if "gbytes" in row else {})
      for row in of_kernel
    ]
  old = report.rows_in(arguments.out / "kernels.json")
  rows = list(report.merged(old, rows, ("target", "kernel", "peer")).values())
  report.write(
    "kernels",
    "Fused kernels under a policy, compiled",
    "python -m benchmarks.own.kernels --target v5e  # or h100",
    "compilers of the targets",
    rows,
    report.table(rows, COLUMNS),
    arguments.out,
  )


if __name__ == "__main__":
  main()
