"""Sums over the calibration tokens: the gram G = XᵀX, and the drift of the inputs X̂ᵀ(X - X̂).

It may import the ground (errors, config) and machine.
"""
