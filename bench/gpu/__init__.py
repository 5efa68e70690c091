"""`python -m bench.gpu tests` and `python -m bench.gpu figures`: all that needs a GPU, which `make gpu-check` runs.

What is wrong on a new machine must not take the rest of the evidence along. Every piece of work runs in a process of
its own (`workers`), which writes a journal as it goes (`journal`), dies of its own watchdog when a piece hangs, and is
started again behind the piece that it died of. The journals become one file of results per GPU (`results`).
"""
