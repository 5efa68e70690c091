"""Leave no trace: gradients, buffers, modes, random numbers and precision, as they were."""
