"""Methods against goldens, oracles and the reference; faults and bad input."""
