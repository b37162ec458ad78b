"""Triton kernels for GPUs. Each has a torch twin, and loops for CPUs, elsewhere in core, with which its bits agree.

Triton comes with the CUDA builds of torch; ``serves`` in launch.py says whether the kernels run on a device.
Files whose names end in ``_kernels`` need it to be imported, so functions import them when they are called.
"""
