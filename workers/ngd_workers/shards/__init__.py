"""Tar shards of labelled images: a folder of images made into them, and the index by which samples are found in them.

Start at `pack` or `index`. Imports without torch: the `ngd` command uses it.
"""
