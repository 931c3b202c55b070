"""Weights that are kept elsewhere: on disk, in memory beside a device, or sharded over ranks.

It may import the ground (errors, config) and the rooms from machine to finding.
"""
