"""Qwen3-TTS-Tokenizer-12Hz: Mimi's encoder half, and a causal decoder of its own."""
