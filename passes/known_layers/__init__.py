"""Layers of transformers that need code of their own, and their equivalents with nn.Linear.

It may import the ground (errors, config) and the rooms from machine to graphs.
"""
