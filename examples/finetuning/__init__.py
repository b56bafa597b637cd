"""The parts of ``examples/finetune.py``: data, model, adapters, training and the report."""
