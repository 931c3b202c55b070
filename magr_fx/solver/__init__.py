"""MagR's least-squares problem for one weight and its gram: input is checked, solved and judged.

It may import the ground (errors, config) and the rooms from machine to iterations.
"""
