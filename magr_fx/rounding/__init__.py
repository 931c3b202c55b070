"""From rows to codes: nearest rounding, GPTQ, coordinate descent, the search for alpha and clip.

It may import the ground (errors, config) and the rooms from machine to solver.
"""
