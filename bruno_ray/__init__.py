"""bruno-ray: find a behaviour in a language model, remove it, prove what else changed, serve the result."""

__version__ = "0.1.0"
