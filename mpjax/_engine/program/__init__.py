"""The traced program: its jaxprs read, run and rebuilt, on every JAX version."""
