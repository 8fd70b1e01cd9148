"""What every part of the package uses and none is about."""
