"""Serving: base and edited models side by side, as rows of one batch."""
