"""Which weights meet an input in a matmul, and which tokens of that input count.

It may import the ground (errors, config) and the rooms from machine to tracing.
"""
