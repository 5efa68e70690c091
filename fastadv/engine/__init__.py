"""The engine's three verbs (descend, probe, ascend), and where the perturbation enters the model."""
