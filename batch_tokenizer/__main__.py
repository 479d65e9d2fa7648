"""``python -m batch_tokenizer`` and ``torchrun -m batch_tokenizer``."""

import sys

from batch_tokenizer.cli import main

if __name__ == "__main__":
    sys.exit(main())
