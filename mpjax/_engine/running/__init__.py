"""How a plan runs: its values, its fused units, and the derivatives that it gives."""
