"""The resources of the machine: memory, disks, files of tensors, other ranks.

It may import the ground (errors, config).
"""
