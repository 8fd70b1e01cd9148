"""What a model answers, and how well."""
