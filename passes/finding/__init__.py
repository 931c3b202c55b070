"""Find the weights that are multiplied with an input, and the tokens of that input that count.

It may import the ground (errors, config) and the rooms from machine to tracing.
"""
