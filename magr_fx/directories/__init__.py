"""Convert a model directory of transformers into one with rewritten or quantized weights.

It may import the ground (errors, config) and the rooms from machine to model_files.
"""
