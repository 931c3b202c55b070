"""What a traced graph is, and what one can ask of its nodes.

It may import the ground (errors, config) and the rooms from machine to costs.
"""
