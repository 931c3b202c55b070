"""MagR's optimisation problem for one weight and its gram: input checks, solving, evaluation.

It may import the ground (errors, config) and the rooms from machine to iterations.
"""
