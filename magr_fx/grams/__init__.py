"""Sums of products of the calibration: the gram G = XᵀX, and how far inputs have drifted.

It may import the ground (errors, config) and machine.
"""
