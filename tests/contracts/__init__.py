"""What every method keeps: faults, dropout, autocast, compilation, accumulation, bad input, the model's structure."""
