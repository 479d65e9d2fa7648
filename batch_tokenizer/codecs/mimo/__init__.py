"""MiMo-Audio-Tokenizer: log-mel, transformer encoder, residual vector quantizer, transformer decoder with a Vocos head."""
