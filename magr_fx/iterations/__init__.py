"""ADMM and projected gradient descent on MagR's objective, and the certificate of either.

It may import the ground (errors, config) and the rooms from machine to grams.
"""
