"""Fine-tuning of converted models on transformers' trainer."""
