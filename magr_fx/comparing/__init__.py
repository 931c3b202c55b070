"""How far a quantized model is from the original: both run on the same text, token by token.

It may import the ground (errors, config) and the rooms from machine to entries.
"""
