"""Rotating weights at no cost: which streams can be rotated, by what, and the rotation itself.

It may import the ground (errors, config) and the rooms from machine to finding.
"""
