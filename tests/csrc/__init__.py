"""csrc and its launchers."""
