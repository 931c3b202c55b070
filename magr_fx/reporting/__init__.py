"""What was done, as objects, text, files, pictures and log records.

It may import the ground (errors, config) and the rooms from machine to rounding.
"""
