"""Training of MiMo-shaped tokenizers: from a manifest of audio to a checkpoint folder for ``--model_path``."""
