"""A page in the browser on which an original and a converted model answer side by side."""
