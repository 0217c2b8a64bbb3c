"""Scorers: what a trial is judged by. `registry.py` lists them and says how to add one.

Importing this package alone imports no torch.
"""
