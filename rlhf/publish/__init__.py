"""What others get of a run: the aligned policy with a model card, on the Hugging Face hub if asked for."""
