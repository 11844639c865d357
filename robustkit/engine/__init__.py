"""The engine: runs attacks chunk by chunk, counts, verifies every success, and writes the run folder."""
