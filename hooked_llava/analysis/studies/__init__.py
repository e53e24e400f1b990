"""Analyses, one or several together, of every question of a table: a model and rows in, a labelled dataset out.

A study uses `datasets.study` and the analyses beside this package.
"""
