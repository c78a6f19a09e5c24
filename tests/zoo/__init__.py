"""Small models of the kinds that people train, in Linen and in NNX, written without dtypes."""
