"""Which weights torchao can quantize, how it rounds them, and the quantization itself.

It may import the ground (errors, config) and the rooms from machine to collecting.
"""
