"""What torchao makes of a weight, which weights it can quantize, and the hand-over to it.

It may import the ground (errors, config) and the rooms from machine to collecting.
"""
