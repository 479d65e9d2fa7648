"""Results to files: token JSON, wav, atomic publishing. Knows nothing of models."""
