"""Codecs of the transformers library behind the codec protocol: its models, our codes (T, K) and samples (S,)."""
