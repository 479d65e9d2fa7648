"""S3Tokenizer, the speech tokenizers of CosyVoice: 16 kHz speech to one code a frame, and no way back."""
