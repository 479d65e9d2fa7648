"""Codec families behind one protocol: ``base.py`` states it, ``registry.py`` finds the family of a checkpoint."""
