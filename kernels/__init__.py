"""Triton kernels: one file per operation family. They know tensors and strides, nothing of ops or modules."""
