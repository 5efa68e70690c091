"""Float64 oracles from the papers, recorded runs of public code, and `fastadv.reference`: what the numbers must be."""
