"""From rows to codes: nearest, GPTQ, coordinate descent, and the choice between candidates.

It may import the ground (errors, config) and the rooms from machine to solver.
"""
