"""Natural gradients of models that are small enough to be treated exactly."""
