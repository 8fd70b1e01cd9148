"""An original model becomes a converted one, in memory or on disk, one layer at a time."""
