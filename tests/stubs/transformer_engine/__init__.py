"""A stand-in for Transformer Engine 2.9: its names and keyword arguments with plain torch maths, so that what is built
of its layers (names, shapes, checkpoints, gradients) can be tried without a GPU. Nothing of it is fast; FP8 products
are ones of numbers that were rounded to FP8.

It must be on the path before Megatron-Core is imported, so it is used in processes of its own.
"""

from transformer_engine import common, pytorch

__version__ = "2.9.0"
