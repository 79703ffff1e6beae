"""The parts of ``tools/make_demo_model.py``: text, tokenizer, baseline, training, evaluation and model card."""
