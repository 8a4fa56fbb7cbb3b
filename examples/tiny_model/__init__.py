"""How the bundled model was made: data, tokenizer, network, export and model card. Run
`examples/train_tiny_model.py`."""
