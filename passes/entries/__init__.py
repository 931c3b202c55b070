"""The ways in: the run that all share, the fx pass, torchao's own flow, and the plan.

It may import the ground (errors, config) and the rooms from machine to rewriting.
"""
