"""NNX models: calls of them made pure, their train step; which kind of module a thing is."""
