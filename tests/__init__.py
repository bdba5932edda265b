"""The test suite. A regular package: some distributions install a top-level `tests` that would shadow a bare folder."""
