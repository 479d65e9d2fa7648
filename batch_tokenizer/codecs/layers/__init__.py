"""Layers that several codec families share, for batches of utterances of different lengths padded on the right."""
