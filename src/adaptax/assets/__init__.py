"""What ships with the package: a tiny base model, its tokenizer, a small dataset, and the recipes that made them."""
