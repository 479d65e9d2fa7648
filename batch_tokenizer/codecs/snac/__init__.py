"""SNAC: convolutions down to frames, codebooks at several rates, and back up."""
