"""How a function becomes a plan, and how a plan runs."""
