"""``python -m batch_tokenizer`` and ``torchrun -m batch_tokenizer``."""

from batch_tokenizer.runtime.parent import stop_with_parent

if __name__ == "__main__":
    stop_with_parent()  # before the imports below, which take seconds
    from batch_tokenizer.cli import console

    console()
