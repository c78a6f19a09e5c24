"""Loss scaling and the other transformations around an optimizer."""
