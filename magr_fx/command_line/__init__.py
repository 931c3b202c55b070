"""The command line: options, messages, exit codes, and its ranks.

It may import the ground (errors, config) and the rooms from machine to directories.
"""
