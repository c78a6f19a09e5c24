"""Models that others wrote and published, each built small, and how to run it as a function."""
