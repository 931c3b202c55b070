"""Traced graphs: their data types, and questions about their nodes and weights.

This room may import the ground (errors, config) and the rooms from machine to costs.
"""
