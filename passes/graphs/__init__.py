"""Traced graphs: their data types, and questions about their nodes and weights.

It may import the ground (errors, config) and the rooms from machine to costs.
"""
