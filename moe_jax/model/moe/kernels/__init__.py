"""Experts on rows that lie sorted by expert, in numbers known only at run time: one file a family of kernels."""
