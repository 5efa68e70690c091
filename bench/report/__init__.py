"""From pytest-benchmark's files to what is kept: figures, tables and pictures."""
