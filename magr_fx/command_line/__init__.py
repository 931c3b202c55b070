"""The command line: options, messages, exit codes, and ranks under torchrun.

It may import the ground (errors, config) and the rooms from machine to directories.
"""
