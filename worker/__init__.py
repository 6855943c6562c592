"""Turns queued jobs into stored outcomes on whatever GPUs are here."""
