"""Measurements against raw torch, Lightning and Ray Train: `make bench`, or `python -m benchmarks small_step`."""
