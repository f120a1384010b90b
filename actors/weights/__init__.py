"""Weights at rest: model directories, checkpoints, and the packed formats of integers in them."""
