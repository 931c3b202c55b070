"""From a model and a budget to a config for each weight: what each choice costs and takes.

It may import the ground (errors, config) and the rooms from machine to rewriting.
"""
