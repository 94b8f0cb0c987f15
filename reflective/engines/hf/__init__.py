"""Models of transformers: decoded, heard while they decode, and run over finished text."""
