"""Weights that are offloaded to disk or CPU memory, or sharded over ranks.

It may import the ground (errors, config) and the rooms from machine to rotating.
"""
