"""The options of every run over a model, each declared once."""
