"""Everything that makes the built-in checkpoint `pocket`: data, tokenizer, model, training, export, evaluation."""
