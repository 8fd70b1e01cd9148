"""The command `mha2mla`."""
