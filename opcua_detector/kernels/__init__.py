"""Numba kernels: functions of arrays and scalars, outputs passed in, explicit signatures.

`jit.kernel` compiles them without counting references; what works on a whole record and allocates is compiled by
`numba.njit`. Each has a slow, readable twin of the same name in `tests/oracle.py`.
"""
