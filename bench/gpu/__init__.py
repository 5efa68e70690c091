"""`python -m bench.gpu`, which is `make gpu-check`: all that needs a GPU, in one command of under ten minutes."""
