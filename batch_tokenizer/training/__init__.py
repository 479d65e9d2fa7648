"""Training of MiMo-shaped tokenizers: a manifest of audio enters, a folder for ``--model_path`` leaves."""
