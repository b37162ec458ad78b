"""Triton kernels for GPUs and their launches. Each is bit-identical to a torch version and to the C++ loops for CPUs.

Triton comes with the CUDA builds of torch; ``serves`` in launch.py says whether the kernels run on a device. Files
whose names end in ``_kernels`` import Triton, so functions import them when they are called.
"""
