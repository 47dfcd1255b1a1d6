"""Aligns a language model to several reward models at once, after arXiv 2402.00742."""

__version__ = "0.1.0"
