"""One cell of the GPU table for PyTorch: autocast and GradScaler; `gpu.py` gives it as JSON."""

import json
import sys
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks import meters, workloads
from benchmarks.peers import torch_models

DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16, "": torch.bfloat16}


def model_of(workload: workloads.Workload) -> Any:
  """The workload's model, with what PyTorch must know beforehand."""
  kind = getattr(torch_models, workload.model.__name__)
  known = {"Transformer": "length", "VisionTransformer": "side"}.get(workload.model.__name__)
  extra = {known: workload.inputs.shape[1]} if known else {}
  return kind(**workload.sizes, **extra)


def in_float8(model: Any) -> Any:
  """The model with torchao's float8 matmuls in its linear layers but for the head.

  Scales are a tensor's, computed where they are used. A machine without float8 matmuls emulates
  them.
  """
  from torchao.float8 import (  # pyright: ignore[reportMissingImports]
    Float8LinearConfig,
    convert_to_float8_training,
  )

  return convert_to_float8_training(
    model,
    module_filter_fn=lambda module, name: "head" not in name,
    config=Float8LinearConfig(emulate=not torch.cuda.is_available()),
  )


def timed(cell: dict[str, Any], batch: int | None = None) -> dict[str, Any]:
  """Step time, energy and memory of torch.amp on a workload."""
  makers = {**workloads.FULL, **workloads.TINY}
  batch = batch or cell.get("batch")
  workload = makers[cell["workload"]](**({"batch": batch} if batch else {}))
  device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
  torch.manual_seed(0)
  model = model_of(workload).to(device)
  if cell["kind"] == "float8":
    model = in_float8(model)
  inputs, labels = (torch.from_numpy(array).to(device) for array in workloads.batch_of(workload))
  if inputs.ndim == 4:  # channels last, as JAX has them
    model = model.to(memory_format=torch.channels_last)
    inputs = inputs.permute(0, 3, 1, 2)
  else:
    inputs = inputs.long()
  runner = torch.compile(model) if cell["compiled"] else model
  step = Step(cell, runner, model, inputs, labels.long())
  wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
  found = meters.measure(step, wait, cell["seconds"])
  peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
  return {
    **found,
    "batch": workload.inputs.shape[0],
    "peak_bytes": peak,
    "compiler_bytes": None,
    "loss": float(step.loss),
  }


class Step:
  """A train step with AdamW: autocast around the model, the loss in float32, GradScaler."""

  def __init__(
    self, cell: dict[str, Any], runner: Any, model: Any, inputs: Any, labels: Any
  ) -> None:
    self.device = inputs.device.type
    self.dtype = DTYPES[cell["policy"]] if cell["peer"] != "torch, float32" else None
    self.runner, self.inputs, self.labels = runner, inputs, labels
    fused = self.device == "cuda"
    self.optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-4, fused=fused)
    self.scaler = torch.amp.GradScaler(self.device, 2.0**15, enabled=self.dtype == torch.float16)
    self.loss: Any = None

  def __call__(self) -> None:
    """Takes one step."""
    with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
      outputs = self.runner(self.inputs)
    outputs = outputs.float().reshape(-1, outputs.shape[-1])
    self.loss = torch.nn.functional.cross_entropy(outputs, self.labels.reshape(-1))
    self.optimizer.zero_grad(set_to_none=True)
    self.scaler.scale(self.loss).backward()
    self.scaler.step(self.optimizer)
    self.scaler.update()


def largest(cell: dict[str, Any]) -> dict[str, Any]:
  """The largest batch that fits: doubled until it does not, then halved steps back."""
  if not torch.cuda.is_available():
    raise RuntimeError("The largest batch is looked for on a CUDA card. There is none here.")
  size = fits = timed(cell)["batch"]
  best: dict[str, Any] = {}
  step = size
  while step >= max(8, fits // 16):
    try:
      best = timed({**cell, "seconds": 0}, fits + step)
      fits += step
      step *= 2
    except torch.cuda.OutOfMemoryError:
      torch.cuda.empty_cache()
      step //= 4
  torch.cuda.reset_peak_memory_stats()
  return timed(cell, fits) if best else timed(cell)


KINDS = {"fixed": timed, "largest": largest, "float8": timed}


def main() -> None:
  """Measures the cell on the command line; prints its figures as JSON, in the last line."""
  cell = json.loads(sys.argv[1])
  # JAX's default on these cards is TF32, which is "high" here.
  torch.set_float32_matmul_precision("highest" if cell["precision"] == "highest" else "high")
  torch.backends.cudnn.allow_tf32 = cell["precision"] != "highest"
  with meters.alone(cell):
    figures = KINDS[cell["kind"]](cell)
  print(json.dumps({"framework": f"torch {torch.__version__}", **figures}))


if __name__ == "__main__":
  main()
