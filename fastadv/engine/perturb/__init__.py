"""A step's perturbation, by scope: one vector per position, one row per distinct token id, or the table itself."""
