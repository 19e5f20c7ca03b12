"""Timings of what a request passes through: `make bench`. Not run by `make test`."""
