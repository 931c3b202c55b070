"""Complete grams → rewritten weights: solve on one or several ranks, write, save and report.

It may import the ground (errors, config) and the rooms from machine to handover.
"""
