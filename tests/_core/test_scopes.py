"""Module paths from name stacks."""

import pytest

from mpjax._core.scopes import is_backward, is_forward_again, is_recomputed, module_path


@pytest.mark.parametrize(
  ("stack", "path"),
  [
    ("", ()),
    ("jvp()", ()),
    ("encoder/dense", ("encoder", "dense")),
    ("transpose(jvp(encoder))/dense", ("encoder", "dense")),
    ("transpose(jvp(layers/1))", ("layers", "1")),
    ("transpose(jvp(layers/1))/layers/1/norm", ("layers", "1", "layers", "1", "norm")),
    ("jvp(Net)/Net.encode/dense", ("Net", "dense")),
    ("jvp(Net)/rematted_computation/Net/dense", ("Net", "Net", "dense")),
    ("jvp(Net)/checkpoint/jvp(Net)/dense", ("Net", "dense")),
    ("eqx.nn.MLP/eqx.nn.Linear", ("eqx.nn.MLP", "eqx.nn.Linear")),
  ],
)
def test_a_name_stack_spells_a_module_path(stack, path):
  assert module_path(stack) == path


def test_the_backward_pass_and_what_it_computes_again_are_told_apart():
  assert is_backward("transpose(jvp(a))") and not is_backward("jvp(a)")
  assert is_recomputed("rematted_computation/layer") and not is_recomputed("transpose(jvp(a))")


def test_a_gradient_inside_of_a_checkpoint_is_no_forward_pass():
  assert is_forward_again("transpose(jvp(checkpoint))/rematted_computation/layer")
  assert not is_forward_again("rematted_computation/transpose(jvp(layer))")
  assert not is_forward_again("transpose(jvp(layer))")
