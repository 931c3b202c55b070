"""Formulas for the cost of a run: memory, disk, operations and time.

It may import the ground (errors, config) and the rooms from machine to reporting.
"""
