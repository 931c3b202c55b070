"""Complete grams become rewritten weights: solved, spread over ranks, saved, and noted.

It may import the ground (errors, config) and the rooms from machine to handover.
"""
