"""Small vision-language models that ship with the package, so that nothing needs a model hub.

Each is a complete transformers folder with the real architecture, processor and tokenizer of its
family, trained by `zoo.recipe` to read pages of real handwritten digits.
"""
