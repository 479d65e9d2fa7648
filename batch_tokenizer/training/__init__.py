"""Training of tokenizers of the MiMo architecture, from a source of audio to a folder for ``--model_path``."""
