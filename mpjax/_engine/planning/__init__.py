"""How each equation of a jaxpr is to be computed, and what its operands are cast to."""
