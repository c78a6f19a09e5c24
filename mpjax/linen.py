"""Precision policies for Flax Linen modules."""

from mpjax._flax.linen_modules import apply_policy

__all__ = ["apply_policy"]
