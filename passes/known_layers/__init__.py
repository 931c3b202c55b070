"""Layers of transformers that are known by name, fused experts for one, made of nn.Linear.

It may import the ground (errors, config) and the rooms from machine to graphs.
"""
