"""MiMo-Audio-Tokenizer: log-mel, transformer encoder, residual quantizer, transformer decoder, Vocos head."""
