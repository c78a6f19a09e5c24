"""What must run under autocast because it runs in float32: functions of two arrays.

``w`` is an 8 by 8 parameter, ``x`` is 2 by 8 data. Each module holds ``CASES``, by name; its
docstring says which public names of JAX it covers.
"""

from battery import constructs, functions, lax_ops, linalg, special

MODULES = (linalg, functions, special, lax_ops, constructs)
CASES = {name: fn for module in MODULES for name, fn in module.CASES.items()}
FORWARD_ONLY = frozenset(name for module in MODULES for name in module.FORWARD_ONLY)
