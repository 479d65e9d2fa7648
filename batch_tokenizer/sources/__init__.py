"""What ``--data_list`` may name, and how it becomes one local JSON-lines file for ``manifest.py`` (``listing.py``)."""
