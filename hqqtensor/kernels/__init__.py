"""Kernels by device. They see packed bytes, scales and zero points, never modules."""
