"""One file per section of the paper; `get_config("tiny" | "full")` returns an `ml_collections.ConfigDict`."""
