"""Runner hooks: they say when, the core says what."""
