"""Processes and machines; no mathematics."""
