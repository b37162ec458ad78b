"""Triton kernels for GPUs. Each has a torch twin, and loops for CPUs, elsewhere in core, with which its bits agree.

Triton comes with torch's CUDA builds; :func:`pst_ds.core.kernels.launch.serves` says whether kernels run somewhere.
Files whose names end in ``_kernels`` need it to be imported, so functions import them when they are called.
"""
