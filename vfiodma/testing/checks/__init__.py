"""The checks of the conformance suite, one subject a file."""
