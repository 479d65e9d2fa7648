"""WavTokenizer: EnCodec's encoder, one codebook, and a Vocos decoder."""
