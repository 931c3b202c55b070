"""Weights that are offloaded to disk or CPU memory, or sharded over ranks.

This package may import errors, config and the packages from machine to finding.
"""
