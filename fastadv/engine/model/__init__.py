"""The model: which modules are perturbed, the hooks on them, and what the model is wrapped in."""
