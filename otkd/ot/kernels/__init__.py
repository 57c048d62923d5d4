"""The ways to apply exp(−C/ε): one class for each form in which a cost can be given.

:mod:`~otkd.ot.kernels.base` says what a kernel is; :mod:`~otkd.ot.kernels.choice` picks one.
"""
