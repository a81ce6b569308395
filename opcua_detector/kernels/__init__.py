"""Numba kernels: functions of arrays and scalars, outputs passed in, explicit signatures.

Each has a slow, readable twin of the same name in `tests/oracle.py`.
"""
