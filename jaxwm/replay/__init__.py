"""Replay: rings of rows on the device or in the host's memory."""
