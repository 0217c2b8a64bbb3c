"""Telling somebody who does not look: what happened, by a command or a webhook, once."""
