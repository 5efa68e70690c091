"""Two revisions of fastadv against each other, in turns: `python -m bench.compare REF`."""
