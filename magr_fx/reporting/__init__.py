"""Reports on a run: objects, text, files, plots and log records.

It may import the ground (errors, config) and the rooms from machine to rounding.
"""
