"""Benchmarks of the CUDA kernels: ``python -m benchmarks``, from a checkout, on a GPU."""
