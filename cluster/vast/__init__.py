"""Vast.ai: what its HTTP API says (models), asking it (client), and choosing a machine (offers, disk)."""
