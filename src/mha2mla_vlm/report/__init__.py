"""One page about a conversion: what was gained, what was lost, and where."""
