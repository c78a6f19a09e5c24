"""The parts that the train steps of Linen and of NNX share."""
