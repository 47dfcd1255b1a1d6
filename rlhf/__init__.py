"""Aligns a language model to several reward models at once, after arXiv 2402.00742."""
