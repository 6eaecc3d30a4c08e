"""What clients import: the stubs of mull's protocol."""
