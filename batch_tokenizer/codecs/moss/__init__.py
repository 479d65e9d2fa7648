"""MOSS-Audio-Tokenizer (Cat): patches and causal transformers down to frames, a residual quantizer, and back up."""
