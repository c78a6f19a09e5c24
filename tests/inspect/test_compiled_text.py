"""What is read off the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from mpjax.inspect import _compiled_text as compiled_text

CARD = compiled_text.Card(
  bandwidth=1e9, peaks={"f8": 8e9, "bf16": 4e9, "f16": 4e9, "tf32": 2e9, "f32": 1e9}
)


# Bytes --------------------------------------------------------------------------------------------


def test_a_compiled_programs_bytes_are_those_of_its_kernels():
  x = jnp.ones((8, 8))
  text = jax.jit(lambda x, y: x @ y).lower(x, x).compile().as_text()
  assert compiled_text.moved(text) == 3 * 8 * 8 * 4


def test_a_loop_counts_as_often_as_it_runs():
  def program(times):
    fn = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, c: jnp.sin(c) @ c, x))
    return compiled_text.moved(fn.lower(jnp.ones((64, 64))).compile().as_text())

  sine_and_matmul = (2 + 3) * 64 * 64 * 4
  carry_copied_and_counted = 2 * 64 * 64 * 4 + 64
  one_turn = (program(14) - program(7)) / 7
  assert sine_and_matmul <= one_turn <= sine_and_matmul + carry_copied_and_counted


def test_a_conditional_counts_as_its_costliest_branch():
  branches = [lambda x: x, lambda x: x @ x @ x]
  fn = jax.jit(lambda which, x: jax.lax.switch(which, branches, x))
  text = fn.lower(jnp.int32(0), jnp.ones((64, 64))).compile().as_text()
  square_and_product, copied_in_and_out = (2 + 3) * 64 * 64 * 4, 4 * 64 * 64 * 4 + 64
  assert square_and_product <= compiled_text.moved(text) <= square_and_product + copied_in_and_out


def test_what_a_core_reads_in_its_fast_memory_does_not_move():
  fetched = """%fused (p0: f32[8], p1: f32[2,4]) -> f32[8] {
  %p0 = f32[8]{0:T(1024)S(1)} parameter(0)
  %p1 = f32[2,4]{1,0:T(8,128)S(1)} parameter(1)
  %flat = f32[8]{0:T(1024)} bitcast(%p1)
  ROOT %sum = f32[8]{0:T(1024)} add(%p0, %flat)
}

ENTRY %main () -> f32[8] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %y = f32[8]{0:T(1024)} parameter(1)
  %copy-start = (f32[8]{0:T(1024)S(1)}, f32[8]{0:T(1024)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[8]{0:T(1024)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]) slice-start(%x)
  %slice-done = f32[2,4]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  ROOT %fusion = f32[8]{0:T(1024)} fusion(%copy-done, %slice-done), kind=kLoop, calls=%fused
}
"""
  y, part_of_x, result = 8 * 4, 2 * 4 * 4, 8 * 4
  assert compiled_text.moved(fetched) == y + part_of_x + result


def test_what_is_sliced_or_updated_in_place_counts_with_the_slice():
  text = """%fused (p0: f32[9,8], p1: s32[], p2: f32[9,8]) -> (f32[1,8], f32[9,8]) {
  %p0 = f32[9,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[9,8]{1,0} parameter(2)
  %same = f32[9,8]{1,0} bitcast(%p0)
  %row = f32[1,8]{1,0} dynamic-slice(%same, %p1, %p1), dynamic_slice_sizes={1,8}
  %sine = f32[1,8]{1,0} sine(%row)
  %put = f32[9,8]{1,0} dynamic-update-slice(%p2, %sine, %p1, %p1)
  ROOT %both = (f32[1,8]{1,0}, f32[9,8]{1,0}) tuple(%sine, %put)
}

ENTRY %main (x: f32[9,8], n: s32[], y: f32[9,8]) -> (f32[1,8], f32[9,8]) {
  %x = f32[9,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %y = f32[9,8]{1,0} parameter(2)
  %cut = f32[2,8]{1,0} slice(%x), slice={[0:2], [0:8]}
  ROOT %fusion = (f32[1,8]{1,0}, f32[9,8]{1,0}) fusion(%x, %n, %y), kind=kLoop, calls=%fused
}
"""
  row = 8 * 4
  cut, taken, index, written = 2 * 2 * row, row, 4, 2 * row
  # The index is read by the slice and by the update.
  assert compiled_text.moved(text) - (cut + taken + index + written) in (0, index)


def test_a_fusion_that_runs_beside_others_counts_once_and_in_place():
  text = """%put (p0: f32[9,8], p1: s32[], p2: f32[1,8]) -> f32[9,8] {
  %p0 = f32[9,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  ROOT %in = f32[9,8]{1,0} dynamic-update-slice(%p0, %p2, %p1, %p1)
}

ENTRY %main (x: f32[9,8], n: s32[], row: f32[1,8]) -> f32[9,8] {
  %x = f32[9,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %row = f32[1,8]{1,0} parameter(2)
  %begun = ((f32[9,8]{1,0}, s32[], f32[1,8]{1,0}), f32[9,8]{1,0}, u32[]) \
fusion-start(%x, %n, %row), kind=kLoop, calls=%put
  ROOT %done = f32[9,8]{1,0} fusion-done(%begun)
}
"""
  row, index = 8 * 4, 4
  assert compiled_text.moved(text) - (2 * row + index) in (0, index)


# Time ---------------------------------------------------------------------------------------------


def test_cycles_are_summed_loops_as_often_as_they_run():
  text = """%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%a, backend_config={"estimated_cycles":"10"}
}

%cond (c: f32[8]) -> pred[] {
  ROOT %less = pred[] fusion(%c), kind=kLoop, calls=%b, backend_config={"estimated_cycles":"1000"}
}

%callee (q: f32[8]) -> f32[8] {
  ROOT %g = f32[8]{0} fusion(%q), kind=kLoop, calls=%a, backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[8]{0}) async-start(%x), calls=%callee
  %while = f32[8]{0} while(%x), condition=%cond, body=%body, backend_config={SEVEN_TIMES}
  %done = f32[8]{0} async-done(%start)
  ROOT %h = f32[8]{0} fusion(%while, %done), calls=%a, backend_config={"estimated_cycles":"3"}
}
""".replace("SEVEN_TIMES", '"known_trip_count":{"n":"7"},"estimated_cycles":"70"')
  assert compiled_text.estimated_cycles(text) == 5 + 7 * 10 + 3
  assert compiled_text.estimated_cycles(text.replace("estimated_cycles", "other")) is None
  unknown = text.replace('"estimated_cycles":"5"', f'"estimated_cycles":"{2**63 - 1}"')
  assert compiled_text.estimated_cycles(unknown) is None


KERNELS = {
  "Triton's bfloat16": ("bf16", 2 * 8 * 4 * 16, ""),
  "Triton's float32": ("tf32", 2 * 8 * 4 * 16, ""),
  "Triton's float32, exact": ("f32", 2 * 8 * 4 * 16, ", operand_precision={highest,highest}"),
  "Triton's float8": ("f8", 2 * 8 * 4 * 16, ""),
}


@pytest.mark.parametrize(("peak", "operations", "attributes"), KERNELS.values(), ids=KERNELS)
def test_a_matmul_in_a_fusion_counts_at_the_peak_of_its_dtype(peak, operations, attributes):
  dtype = {"tf32": "f32", "f8": "f8e4m3fn"}.get(peak, peak)
  text = f"""%gemm (a: {dtype}[8,16], b: {dtype}[16,4]) -> bf16[8,4] {{
  %a = {dtype}[8,16]{{1,0}} parameter(0)
  %b = {dtype}[16,4]{{1,0}} parameter(1)
  ROOT %dot = bf16[8,4]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}{attributes}
}}

ENTRY %main (x: {dtype}[8,16], y: {dtype}[16,4]) -> bf16[8,4] {{
  %x = {dtype}[8,16]{{1,0}} parameter(0)
  %y = {dtype}[16,4]{{1,0}} parameter(1)
  ROOT %fusion = bf16[8,4]{{1,0}} fusion(%x, %y), kind=kCustom, calls=%gemm
}}
"""
  item = {"bf16": 2, "f8": 1}.get(peak, 4)
  moving = ((8 * 16 + 16 * 4) * item + 8 * 4 * 2) / CARD.bandwidth
  time = compiled_text.roofline(text, CARD)
  assert time.unknown == 0
  assert time.seconds == pytest.approx(max(moving, operations / CARD.peaks[peak]))
  fast = CARD._replace(bandwidth=1e12)
  assert compiled_text.roofline(text, fast).seconds == pytest.approx(operations / CARD.peaks[peak])


CONVOLUTION = 2 * (8 * 14 * 14 * 64) * (3 * 3 * 32)
SCORES = (
  'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": '
  '{"element_type": "BF16", "dimensions": ["2", "8", "256", "256"]}}}'
)
CALLS = {
  "cuBLAS": (
    "bf16[8,4]{1,0}",
    "bf16[8,16]{1,0} bf16[16,4]{1,0}",
    'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
    '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    2 * 8 * 4 * 16,
  ),
  "a convolution": (
    "(bf16[8,14,14,64]{3,2,1,0}, u8[0]{0})",
    "bf16[8,29,29,32]{3,2,1,0} bf16[64,3,3,32]{3,2,1,0}",
    'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"',
    CONVOLUTION,
  ),
  "the derivative of its input": (
    "(bf16[8,29,29,32]{3,2,1,0}, u8[0]{0})",
    "bf16[8,14,14,64]{3,2,1,0} bf16[64,3,3,32]{3,2,1,0}",
    'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"',
    CONVOLUTION,
  ),
  "the derivative of its filter": (
    "(bf16[64,3,3,32]{3,2,1,0}, u8[0]{0})",
    "bf16[8,29,29,32]{3,2,1,0} bf16[8,14,14,64]{3,2,1,0}",
    'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"',
    CONVOLUTION,
  ),
  "attention": (
    "(bf16[2,8,256,64]{3,1,2,0}, u8[0]{0})",
    "bf16[2,256,8,64]{3,2,1,0} bf16[2,256,8,64]{3,2,1,0}",
    f'custom_call_target="__cudnn$fmhaSoftmax", {SCORES}',
    2 * 2 * (2 * 8 * 256 * 256 * 64),
  ),
  "attention's derivative": (
    "(bf16[2,8,256,64]{3,1,2,0}, u8[0]{0})",
    "bf16[2,256,8,64]{3,2,1,0} bf16[2,256,8,64]{3,2,1,0}",
    f'custom_call_target="__cudnn$fmhaSoftmaxBackward", {SCORES}',
    5 * 2 * (2 * 8 * 256 * 256 * 64),
  ),
}


def calling(result, operands, attributes):
  first, second = operands.split()
  return f"""ENTRY %main () -> f32[] {{
  %a = {first} parameter(0)
  %b = {second} parameter(1)
  ROOT %call = {result} custom-call(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize("name", CALLS)
def test_what_libraries_multiply_is_counted(name):
  *kernel, operations = CALLS[name]
  fast = CARD._replace(bandwidth=1e18)
  time = compiled_text.roofline(calling(*kernel), fast)
  assert time.seconds == pytest.approx(operations / 4e9)
  assert time.unknown == 0


def test_a_kernel_of_unknown_work_counts_with_its_bytes():
  text = calling("f32[8]{0}", "f32[8]{0} f32[8]{0}", 'custom_call_target="__gpu$xla.gpu.triton"')
  assert compiled_text.roofline(text, CARD) == (3 * 8 * 4 / CARD.bandwidth, 1)


def test_the_operations_of_a_compiled_program_are_those_of_its_matmuls():
  x = jnp.ones((64, 64))
  fn = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, c: jnp.sin(c @ c), x) @ x)
  fast = CARD._replace(bandwidth=1e18)
  time = compiled_text.roofline(fn.lower(x).compile().as_text(), fast)
  assert time.seconds == pytest.approx(6 * 2 * 64**3 / 2e9)
