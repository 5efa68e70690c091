"""Fine-tune a text classifier plainly and adversarially, and compare the two: the command `fastadv`."""
